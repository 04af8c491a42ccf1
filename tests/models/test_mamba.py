"""The model against transformers' MambaForCausalLM with the same weights, and against itself read in other ways."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from model_twins import assert_same_gradients, error, gradients, small_model, tokens, transformers_twin
from torch import Tensor

from mambacus.models import MambaConfig, MambaLM, MambaState
from mambacus.ops import dispatch

BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])


@BACKENDS
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seqlen", [1, 2, 13])
def test_logits_loss_and_every_gradient_are_those_of_transformers(backend: str, tied: bool, seqlen: int) -> None:
    model = small_model(backend=backend, tie_embeddings=tied)
    twin = transformers_twin(model)
    ids = tokens(3, seqlen)
    ours, theirs = model(ids), twin(ids)
    assert error(ours.logits, theirs.logits) <= 1e-5
    (ours.logits**2).sum().backward()
    (theirs.logits**2).sum().backward()
    assert_same_gradients(gradients(model), gradients(twin))
    if seqlen == 1:
        return  # nothing to predict
    labels = ids.clone()
    labels[0, 1:4] = -100
    ours, theirs = model(ids, labels=labels), twin(ids, labels=labels)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(gradients(model), gradients(twin))


@pytest.mark.parametrize(
    "changes", [{"use_bias": True}, {"use_conv_bias": False}, {"expand": 3, "d_conv": 3}, {"norm_eps": 1e-2}]
)
def test_every_shape_option_means_the_same_as_in_transformers(changes: dict) -> None:
    model = small_model(**changes)
    twin = transformers_twin(model)
    ids = tokens(2, 9)
    ours, theirs = model(ids, labels=ids), twin(ids, labels=ids)
    assert error(ours.logits, theirs.logits) <= 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(gradients(model), gradients(twin))


@BACKENDS
def test_bfloat16_is_at_most_as_wrong_as_transformers(backend: str) -> None:
    model = small_model(backend=backend)
    ids = tokens(4, 31)
    exact = copy.deepcopy(model).double()(ids).logits
    theirs = transformers_twin(model).to(torch.bfloat16)(ids).logits.double()
    ours = model.to(torch.bfloat16)(ids).logits.double()
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("wide", [True, False])
def test_in_bfloat16_the_residual_stream_and_the_step_are_float32(wide: bool) -> None:
    model = small_model(residual_in_fp32=wide).to(torch.bfloat16)
    dtypes: dict[str, torch.dtype] = {}
    block = model.backbone.layers[1]
    block.register_forward_hook(lambda _, __, out: dtypes.update(residual=out[0].dtype))
    block.mixer.dt_proj.register_forward_hook(lambda _, __, out: dtypes.update(delta=out.dtype))
    block.mixer.register_forward_hook(lambda _, __, out: dtypes.update(mixed=out[0].dtype, ssm_state=out[2].dtype))
    model(tokens(1, 4))
    assert dtypes == {
        "residual": torch.float32 if wide else torch.bfloat16,
        "delta": torch.float32,
        "mixed": torch.bfloat16,
        "ssm_state": torch.float32,
    }


@BACKENDS
def test_continuing_from_a_state_at_any_point_equals_one_pass(backend: str) -> None:
    model = small_model(backend=backend)
    ids, weights = tokens(2, 11), torch.randn(2, 11, 61)
    whole = model(ids)
    (whole.logits * weights).sum().backward()
    expected = gradients(model)
    for cut in range(1, 11):
        first = model(ids[:, :cut])
        second = model(ids[:, cut:], state=first.state)
        logits = torch.cat([first.logits, second.logits], dim=1)
        assert error(logits, whole.logits) <= 1e-5, cut
        assert error(second.state.ssm_state, whole.state.ssm_state) <= 1e-5
        assert error(second.state.conv_state, whole.state.conv_state) <= 1e-5
        assert second.state.tokens.tolist() == [11, 11]
        (logits * weights).sum().backward()
        assert_same_gradients(gradients(model), expected)


@BACKENDS
def test_token_by_token_equals_one_pass(backend: str) -> None:
    model = small_model(backend=backend)
    ids = tokens(3, 9)
    with torch.no_grad():
        whole = model(ids)
        state, steps = MambaState.zeros(model.config, batch=3), []
        for t in range(9):
            before = [state.conv_state.clone(), state.ssm_state.clone()]
            out = model(ids[:, t : t + 1], state=state)
            assert torch.equal(state.conv_state, before[0]) and torch.equal(state.ssm_state, before[1])
            state = out.state
            steps.append(out.logits)
    assert error(torch.cat(steps, dim=1), whole.logits) <= 1e-5
    assert error(state.ssm_state, whole.state.ssm_state) <= 1e-5


@BACKENDS
def test_a_state_that_may_be_reused_is_changed_in_place(backend: str) -> None:
    model = small_model(backend=backend)
    ids = tokens(3, 9)
    given, mine = (model(ids[:, :3]).state.detach().fork(1) for _ in range(2))
    with torch.no_grad():
        for t in range(3, 9):
            want, out = model(ids[:, t : t + 1], state=given), model(ids[:, t : t + 1], state=mine, reuse_state=True)
            assert out.state.ssm_state.data_ptr() == mine.ssm_state.data_ptr()
            assert torch.equal(out.logits, want.logits)
            for name in ("conv_state", "ssm_state", "tokens"):
                assert torch.equal(getattr(out.state, name), getattr(want.state, name))
            given, mine = want.state, out.state
        seq_idx = torch.tensor([[0] * 4 + [-1] * 5, [0] * 9, [-1] * 9])
        want, out = (model(ids, seq_idx, state=each, reuse_state=each is mine) for each in (given, mine))
        assert out.state.ssm_state.data_ptr() == mine.ssm_state.data_ptr()
        assert torch.equal(out.logits, want.logits) and torch.equal(out.state.tokens, want.state.tokens)
        assert torch.equal(mine.conv_state, want.state.conv_state)
        assert torch.equal(mine.ssm_state, want.state.ssm_state)
        before = mine.ssm_state.clone()
    model(ids[:, :1], state=mine, reuse_state=True)  # gradients may be wanted
    assert torch.equal(mine.ssm_state, before)


def lay_out(documents: list[Tensor], layout: str) -> tuple[Tensor, Tensor | None, list[tuple[int, slice]]]:
    """Return input_ids and seq_idx of documents in one batch, and (row, columns) of each document."""
    lengths = [len(document) for document in documents]
    if layout == "packed":  # two documents in the first row, the others in the second, which is padded on the right
        rows = [documents[:2], documents[2:]]
        width = max(sum(map(len, row)) for row in rows) + 1
        ids, seq_idx = torch.full((2, width), 7), torch.full((2, width), -1, dtype=torch.int32)
        places = []
        for r, row in enumerate(rows):
            start = 0
            for number, document in enumerate(row):
                columns = slice(start, start + len(document))
                ids[r, columns], seq_idx[r, columns] = document, 5 - number  # ids need not rise
                places.append((r, columns))
                start += len(document)
        return ids, seq_idx, places
    width = max(lengths) + 2
    ids = torch.full((len(documents), width), 7)
    seq_idx = torch.full((len(documents), width), -1, dtype=torch.int32)
    places = []
    for r, document in enumerate(documents):
        start = {"left": width - len(document), "right": 0, "both": 1}[layout]
        columns = slice(start, start + len(document))
        ids[r, columns], seq_idx[r, columns] = document, 0
        places.append((r, columns))
    return ids, seq_idx, places


@BACKENDS
@pytest.mark.parametrize("layout", ["packed", "left", "right", "both"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_documents_in_one_batch_equal_documents_alone(backend: str, layout: str, checkpointing: bool) -> None:
    """Packing, padding and batching change neither logits, loss, states nor any gradient."""
    model = small_model(backend=backend)
    documents = [tokens(length, seed=length) for length in (5, 9, 1, 7)]
    expected_logits, expected_states, expected_loss = [], [], 0.0
    for document in documents:
        alone = model(document[None], labels=document[None], num_items_in_batch=1)
        expected_logits.append(alone.logits[0])
        expected_states.append(alone.state)
        expected_loss += alone.loss.item()
        alone.loss.backward()
    expected = gradients(model)

    model.gradient_checkpointing = checkpointing
    ids, seq_idx, places = lay_out(documents, layout)
    together = model(ids, seq_idx=seq_idx, labels=ids, num_items_in_batch=1)
    assert together.loss.item() == pytest.approx(expected_loss, rel=1e-5)
    together.loss.backward()
    assert_same_gradients(gradients(model), expected)
    for (row, columns), logits in zip(places, expected_logits, strict=True):
        assert error(together.logits[row, columns], logits) <= 1e-5
    last_of_row = {row: number for number, (row, _) in enumerate(places)}
    states = MambaState.cat([expected_states[number] for _, number in sorted(last_of_row.items())])
    assert error(together.state.ssm_state, states.ssm_state) <= 1e-5
    assert error(together.state.conv_state, states.conv_state) <= 1e-5
    assert torch.equal(together.state.tokens, states.tokens)


@BACKENDS
def test_a_batch_without_padding_equals_its_rows(backend: str) -> None:
    model = small_model(backend=backend)
    ids = tokens(4, 8)
    for row in ids:
        model(row[None], labels=row[None], num_items_in_batch=1).loss.backward()
    expected = gradients(model)
    together = model(ids, labels=ids, num_items_in_batch=1)
    together.loss.backward()
    assert_same_gradients(gradients(model), expected)
    for row, logits in zip(ids, together.logits, strict=True):
        assert error(logits, model(row[None]).logits[0]) <= 1e-5


@BACKENDS
def test_what_stands_in_padding_is_never_read(backend: str) -> None:
    model = small_model(backend=backend)
    ids, seq_idx, _ = lay_out([tokens(4), tokens(6, seed=2)], "both")
    other = ids.clone()
    other[seq_idx < 0] = 50
    first, second = (model(batch, seq_idx=seq_idx, labels=batch) for batch in (ids, other))
    real = seq_idx >= 0
    assert torch.equal(first.logits[real], second.logits[real])
    assert first.loss == second.loss
    assert torch.equal(first.state.ssm_state, second.state.ssm_state)


@BACKENDS
def test_a_row_of_padding_leaves_its_state_alone(backend: str) -> None:
    model = small_model(backend=backend)
    before = model(tokens(2, 5)).state
    for width in (1, 4):
        padding = torch.full((2, width), -1, dtype=torch.int32)
        after = model(tokens(2, width), seq_idx=padding, state=before).state
        assert torch.equal(after.ssm_state, before.ssm_state)
        assert torch.equal(after.conv_state, before.conv_state)
        assert torch.equal(after.tokens, before.tokens)


@BACKENDS
def test_a_state_reaches_the_first_real_token_behind_left_padding_and_no_further_than_its_document(
    backend: str,
) -> None:
    model = small_model(backend=backend)
    prefix, first, second = tokens(1, 5), tokens(1, 4, seed=2), tokens(1, 6, seed=3)
    state = model(prefix).state
    ids = torch.cat([tokens(1, 2, seed=4), first, second], dim=1)
    seq_idx = torch.tensor([[-1] * 2 + [3] * 4 + [4] * 6])
    out = model(ids, seq_idx=seq_idx, state=state)
    assert error(out.logits[:, 2:6], model(first, state=state).logits) <= 1e-5
    assert error(out.logits[:, 6:], model(second).logits) <= 1e-5
    assert out.state.tokens.tolist() == [6]
    assert model(ids[:, :6], seq_idx=seq_idx[:, :6], state=state).state.tokens.tolist() == [9]


def test_labels_of_first_tokens_and_padding_are_not_scored() -> None:
    model = small_model()
    ids = tokens(1, 8)
    seq_idx = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, -1]])
    scored = model(ids, seq_idx=seq_idx, labels=ids).loss
    for position in (0, 1, 4, 7):
        labels = ids.clone()
        labels[0, position] = (labels[0, position] + 1) % 61
        assert model(ids, seq_idx=seq_idx, labels=labels).loss == scored
    for position in (2, 3, 5, 6):
        labels = ids.clone()
        labels[0, position] = (labels[0, position] + 1) % 61
        assert model(ids, seq_idx=seq_idx, labels=labels).loss != scored


@pytest.mark.parametrize("items", [None, 17])
def test_loss_only_is_the_same_loss_from_fewer_logits(items: int | None) -> None:
    model = small_model()
    ids = tokens(2, 9)
    labels = ids.masked_fill(tokens(2, 9, seed=5) < 30, -100)
    full = model(ids, labels=labels, num_items_in_batch=items)
    full.loss.backward()
    expected = gradients(model)
    short = model(ids, labels=labels, num_items_in_batch=items, loss_only=True)
    assert short.logits is None
    assert short.loss.item() == pytest.approx(full.loss.item(), rel=1e-6)
    short.loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_logits_at_gives_the_logits_of_those_positions() -> None:
    model = small_model()
    ids = tokens(2, 9)
    positions = torch.tensor([[8, 0, 3], [1, 1, 7]])
    whole, picked = model(ids).logits, model(ids, logits_at=positions).logits
    for row in range(2):
        assert error(picked[row], whole[row, positions[row]]) <= 1e-6


def test_gradient_checkpointing_keeps_gradients_and_takes_less_memory() -> None:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    found = []
    for checkpointing in (False, True):
        model = small_model(n_layer=6)
        model.gradient_checkpointing = checkpointing
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(tokens(2, 33), labels=tokens(2, 33))
        size = sum(saved)
        out.loss.backward()
        found.append((gradients(model), size))
    assert_same_gradients(found[1][0], found[0][0], tolerance=1e-6)
    assert found[1][1] < found[0][1] / 3


def test_a_cast_model_keeps_its_float32_parameters_bit_for_bit() -> None:
    model = small_model()
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(("A_log", ".D", "dt_proj.bias"))}
    assert len(kept) == 9
    model(tokens(1, 4), labels=tokens(1, 4)).loss.backward()
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]) and parameter.grad.dtype == torch.float32
        else:
            assert parameter.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16
    model.double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(tokens(1, 4)).logits.dtype == torch.float64


@BACKENDS
def test_autocast_trains_in_bfloat16_with_float32_weights(backend: str) -> None:
    model = small_model(backend=backend)
    ids = tokens(2, 12)
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.logits.dtype == torch.float32
    assert 1e-5 < error(out.logits, exact.logits) < 0.05  # it did compute in bfloat16
    out.loss.backward()
    got = gradients(model)
    exact.loss.backward()
    assert_same_gradients(got, gradients(model), tolerance=0.1)
    assert {gradient.dtype for gradient in got.values()} == {torch.float32}


def test_every_module_is_called_in_prefill_and_in_a_step() -> None:
    """An adapter around any module is in effect on every path."""
    model = small_model()
    called: set[str] = set()
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    leaves = {name for name, module in model.named_modules() if next(module.children(), None) is None}
    state = None
    for seqlen in (5, 1):
        called.clear()
        state = model(tokens(2, seqlen), state=state).state
        assert called == leaves


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_lora_on_any_projection_trains_and_merges(task_type: str | None) -> None:
    from peft import LoraConfig, get_peft_model

    model = small_model()
    targets = ["in_proj", "out_proj", "x_proj", "dt_proj"]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type=task_type))
    ids = tokens(2, 7)
    for _ in range(2):  # B starts at zero, so A has a gradient from the second step on
        tuned(input_ids=ids, labels=ids, seq_idx=torch.zeros_like(ids)).loss.backward()
        trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 4 * 3
        for name, parameter in trained.items():
            if "lora_B" in name:
                assert parameter.grad.abs().max() > 0, name
                parameter.data -= 0.1 * parameter.grad.sign()
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    attached = tuned.eval()(input_ids=ids).logits
    assert error(tuned.merge_and_unload()(ids).logits, attached) <= 1e-5


def test_arguments_that_do_not_fit_are_named() -> None:
    model = small_model()
    ids = tokens(2, 5)
    with pytest.raises(ValueError, match="input_ids"):
        model(ids[0])
    with pytest.raises(ValueError, match="input_ids"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"seq_idx: expected shape \(2, 5\), got \(2, 4\)"):
        model(ids, seq_idx=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="labels"):
        model(ids, labels=ids[:1])
    with pytest.raises(ValueError, match="exclude"):
        model(ids, labels=ids, logits_at=ids[:, :1])
    with pytest.raises(ValueError, match="logits_at"):
        model(ids, logits_at=ids[0])
    with pytest.raises(ValueError, match="expected 2 rows, got 3"):
        model(ids, state=MambaState.zeros(model.config, batch=3))
    with pytest.raises(ValueError, match="conv_state: expected shape"):
        model(ids, state=MambaState.zeros(small_model(d_conv=3).config, batch=2))
    with pytest.raises(TypeError, match="attention_mask"):
        model(ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(NotImplementedError, match="Engine"):
        model.prepare_inputs_for_generation()


def test_initialisation_is_the_papers() -> None:
    torch.manual_seed(0)
    config = MambaConfig(d_model=128, n_layer=4, vocab_size=500)
    model = MambaLM(config)
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in model.backbone.layers:
        mixer = block.mixer
        steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
        assert steps.min() >= 0.001 * 0.999 and steps.max() <= 0.1 * 1.001
        assert steps.log().std().item() == pytest.approx(math.log(100) / math.sqrt(12), rel=0.15)  # log-uniform
        assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(256, 16))
        assert torch.equal(mixer.D, torch.ones(256))
        assert mixer.dt_proj.weight.abs().max() <= 8**-0.5
        bound = 1 / math.sqrt(256) / math.sqrt(4)  # kaiming_uniform(a=sqrt(5)), then 1 / sqrt(n_layer)
        assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    logits = model(tokens(1, 8, vocabulary=500)).logits
    assert logits.std() < 1.0


def test_decay_is_kept_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = small_model().backbone.layers[0].mixer
    with torch.no_grad():
        kept = mixer.decay()
        assert mixer.decay() is kept
        mixer.A_log.add_(0.5)
        assert torch.equal(mixer.decay(), -torch.exp(mixer.A_log)) and mixer.decay() is not kept
        mixer.A_log = torch.nn.Parameter(mixer.A_log.clone())
        assert mixer.decay() is mixer.decay()
    assert mixer.decay() is not mixer.decay() and mixer.decay().requires_grad
    with torch.no_grad():
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # another process may write into it
        assert mixer.decay() is not mixer.decay()


@pytest.mark.parametrize("capturing", [False, True])
def test_decay_is_kept_on_a_gpu_but_not_in_what_is_recorded(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    mixer = small_model().backbone.layers[0].mixer
    monkeypatch.setattr(dispatch, "runs_eagerly_on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with torch.no_grad():
        assert (mixer.decay() is mixer.decay()) == (not capturing)
