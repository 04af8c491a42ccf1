"""State files refuse every model, tokenizer and dtype but their own; a primed model equals one that read the prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mambacus.inference import Engine, SamplingParams
from mambacus.models import MambaState, load
from mambacus.models.primed import PrimedModel
from mambacus.models.state_files import StateFile, read_state, tokenizer_fingerprint, write_state
from mambacus.runtime.errors import UserError

TEXT = "Two and two are four."


@pytest.fixture(scope="module")
def micro() -> tuple[Any, Any]:
    return load("random:micro")


@pytest.fixture
def written(micro: tuple[Any, Any], tmp_path: Path) -> tuple[Path, StateFile]:
    engine = Engine(*micro)
    ids = engine.encode(TEXT)
    file = StateFile(engine.prefill(ids), tuple(ids), {"question": "{question}"}, {"made_by": "a test"})
    write_state(tmp_path / "p.state", file, *micro)
    return tmp_path / "p.state", file


def test_what_was_written_is_read(written: tuple[Path, StateFile], micro: tuple[Any, Any]) -> None:
    path, file = written
    found = read_state(path, *micro)
    assert (found.token_ids, found.prompt, found.notes) == (file.token_ids, file.prompt, file.notes)
    for name in ("conv_state", "ssm_state", "tokens"):
        assert torch.equal(getattr(found.state, name), getattr(file.state, name))
    assert torch.equal(MambaState.load(path).ssm_state, file.state.ssm_state)


def test_another_model_is_refused(written: tuple[Path, StateFile], micro: tuple[Any, Any]) -> None:
    path, _ = written
    with pytest.raises(UserError, match=r"--state .*: made with random:micro, does not fit random:micro: .* has other"):
        read_state(path, load("random:micro", seed=1)[0], micro[1])
    with pytest.raises(UserError, match="of another model: conv_state: expected shape"):
        read_state(path, *load("random:tiny"))


def test_one_changed_tensor_is_another_model(written: tuple[Path, StateFile], micro: tuple[Any, Any]) -> None:
    model, tokenizer = load("random:micro")
    with torch.no_grad():
        model.backbone.layers[1].mixer.x_proj.weight.mul_(1.01)
    with pytest.raises(UserError, match=r"layers\.1\.mixer\.x_proj\.weight has other values"):
        read_state(written[0], model, tokenizer)


def test_another_tokenizer_is_refused(written: tuple[Path, StateFile], micro: tuple[Any, Any]) -> None:
    from tokenizers import pre_tokenizers

    other = load("random:micro")[1]
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="another tokenizer"):
        read_state(written[0], micro[0], other)


def test_padding_and_truncation_do_not_change_a_tokenizer(micro: tuple[Any, Any]) -> None:
    tokenizer = load("random:micro")[1]
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(micro[1])


def test_another_dtype_is_refused(written: tuple[Path, StateFile], micro: tuple[Any, Any]) -> None:
    model, tokenizer = load("random:micro", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="made in float32, the model runs in bfloat16"):
        read_state(written[0], model, tokenizer)


def test_a_model_with_an_adapter_is_another_model(written: tuple[Path, StateFile], micro: tuple[Any, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(load("random:micro")[0], LoraConfig(target_modules=["in_proj"]))
    with pytest.raises(UserError, match="does not fit"):
        read_state(written[0], wrapped, micro[1])
    adapted = written[0].with_name("adapted.state")
    write_state(adapted, written[1], wrapped, micro[1])
    assert read_state(adapted, wrapped, micro[1]).token_ids == written[1].token_ids
    with pytest.raises(UserError, match="does not fit"):
        read_state(adapted, *micro)


@pytest.mark.parametrize("length", [0, 4, 100, 2000, -1])
def test_a_cut_file_is_refused(written: tuple[Path, StateFile], micro: tuple[Any, Any], length: int) -> None:
    path, _ = written
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"p\.state"):
        read_state(path, *micro)


def test_a_changed_byte_is_found_wherever_it_is(written: tuple[Path, StateFile], micro: tuple[Any, Any]) -> None:
    path, _ = written
    raw = path.read_bytes()
    header = int.from_bytes(raw[:8], "little")
    for place in (*range(0, 8 + header, 23), *range(8 + header, len(raw), 2000), raw.index(b"fingerprint") + 3):
        changed = bytearray(raw)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"p\.state") as error:
            read_state(path, *micro)
        assert "\n" not in str(error.value)
    path.write_bytes(raw.replace(b"a test", b"a tesT"))
    with pytest.raises(UserError, match="damaged: its content is not what was written"):
        read_state(path, *micro)


def test_a_plain_state_is_checked_for_its_shape(
    written: tuple[Path, StateFile], micro: tuple[Any, Any], tmp_path: Path
) -> None:
    written[1].state.save(tmp_path / "plain")
    assert read_state(tmp_path / "plain", *micro).token_ids == ()
    written[1].state.fork(2).save(tmp_path / "two")
    with pytest.raises(UserError, match="2 rows, not 1"):
        read_state(tmp_path / "two", *micro)


def test_a_primed_model_reads_on_after_its_start(written: tuple[Path, StateFile], micro: tuple[Any, Any]) -> None:
    model, tokenizer = micro
    primed = PrimedModel(model, written[1].state)
    prompts = [" And five?", " Ten and one are", "\n"]
    plain = Engine(model, tokenizer).generate([TEXT + prompt for prompt in prompts], SamplingParams(max_new_tokens=8))
    engine = Engine(primed, tokenizer)
    assert engine.generate(prompts, SamplingParams(max_new_tokens=8)) == plain
    assert engine.stats.prompt_tokens == sum(map(len, prompts))  # one token a byte: the prefix was not read again


def test_a_trained_start_gets_gradients_in_every_layer(written: tuple[Path, StateFile]) -> None:
    model, _ = load("random:micro")
    model.requires_grad_(False)
    primed = PrimedModel(model, written[1].state, trained=True)
    ids = torch.randint(1, 200, (2, 7))
    primed(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in primed.named_parameters() if parameter.requires_grad}
    assert trained == {"conv_state", "ssm_state"}
    for name in trained:
        gradient = getattr(primed, name).grad
        assert gradient.isfinite().all() and (gradient.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert dataclasses.replace(written[1].state, tokens=primed.tokens).fits(model.config) is None


def test_a_second_document_in_a_row_is_refused(written: tuple[Path, StateFile], micro: tuple[Any, Any]) -> None:
    primed = PrimedModel(micro[0], written[1].state)
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="one document a row"):
        primed(ids, seq_idx=torch.tensor([[0, 0, 1, -1]], dtype=torch.int32))
    primed(ids, seq_idx=torch.tensor([[-1, 0, 0, -1]], dtype=torch.int32))
