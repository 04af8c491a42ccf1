"""The engine: the same completions alone, in any batch, from a state, and from transformers."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mambacus.inference import Completion, Engine, SamplingParams
from mambacus.models import MambaConfig, MambaLM, MambaState, load, load_tokenizer, save
from mambacus.runtime.errors import UserError

# Lengths from 1 to 29, and texts that share no beginning.
TEXTS = [
    f"{'abcdefghijklmnopqrst'[i]}{i} + {i * i} = " + "x" * random.Random(i).randrange(20)
    for i in range(19)
] + ["?"]  # fmt: skip


@pytest.fixture(scope="module")
def greedy(model: MambaLM, tokenizer: Any) -> list[list[Completion]]:
    """What every other way of asking must give: one prompt at a time."""
    engine = Engine(model, tokenizer)
    return [engine.generate([text], SamplingParams(max_new_tokens=16))[0] for text in TEXTS]


def test_greedy_completions_are_those_of_transformers_on_20_prompts(
    model: MambaLM, tokenizer: Any, greedy: list[list[Completion]], tmp_path: Path
) -> None:
    import transformers

    save(model, tmp_path)
    twin = transformers.MambaForCausalLM.from_pretrained(tmp_path).eval()
    assert len({completion.text for [completion] in greedy}) > 15  # they do wander

    def theirs(text: str, **changes: float) -> list[int]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": 0, "pad_token_id": 0, **changes}
        return twin.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()

    for text, [completion] in zip(TEXTS, greedy, strict=True):
        expected = theirs(text)
        assert completion.token_ids == expected
        assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)
    penalised = Engine(model, tokenizer).generate(
        TEXTS[:6], SamplingParams(max_new_tokens=16, repetition_penalty=1.3, ignore_eos=True)
    )
    assert [row[0].token_ids for row in penalised] == [
        theirs(text, repetition_penalty=1.3, eos_token_id=-1) for text in TEXTS[:6]
    ]
    assert penalised != greedy[:6]


@pytest.mark.parametrize("batch_size", [2, 7, 64])
@pytest.mark.parametrize("prefill_tokens", [1, 16, 4096])
def test_batch_and_chunk_sizes_change_nothing(
    model: MambaLM, tokenizer: Any, greedy: list[list[Completion]], batch_size: int, prefill_tokens: int
) -> None:
    engine = Engine(model, tokenizer, batch_size=batch_size, prefill_tokens=prefill_tokens)
    assert engine.generate(TEXTS, SamplingParams(max_new_tokens=16)) == greedy


def test_the_reference_backend_gives_the_same_text(
    model: MambaLM, tokenizer: Any, greedy: list[list[Completion]]
) -> None:
    model.set_backend("reference")
    try:
        assert Engine(model, tokenizer).generate(TEXTS, SamplingParams(max_new_tokens=16)) == greedy
    finally:
        model.set_backend("auto")


def test_finished_rows_leave_the_batch(model: MambaLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, tokenizer)
    widths: list[int] = []
    forward = model.forward

    def counting(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        widths.append(len(input_ids))
        return forward(input_ids, **kwargs)

    texts = [engine.generate([text], SamplingParams(max_new_tokens=12))[0][0].text for text in TEXTS[:4]]
    stop = texts[2][3]  # ends the third completion by its fourth character
    expected = [engine.generate([t], SamplingParams(max_new_tokens=12, stop=[stop]))[0] for t in TEXTS[:4]]
    monkeypatch.setattr(model, "forward", counting)
    got = engine.generate(TEXTS[:4], SamplingParams(max_new_tokens=12, stop=[stop]))
    assert got == expected
    decoded = [width for width in widths if width]
    assert decoded[-1] < 4 and decoded == sorted(decoded, reverse=True)
    assert sum(decoded[1:]) == sum(len(c.token_ids) - 1 for [c] in got)


def test_samples_depend_on_seed_prompt_and_number_only(model: MambaLM, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=10, temperature=1.0, n=5, seed=7)
    together = Engine(model, tokenizer, batch_size=8).generate(TEXTS, params)
    for texts, limits in ((TEXTS[::-1], {"batch_size": 3}), (TEXTS[4:6], {"batch_size": 1, "prefill_tokens": 4})):
        again = Engine(model, tokenizer, **limits).generate(texts, params)
        assert again == [together[TEXTS.index(text)] for text in texts]
    assert all(len({c.text for c in completions}) == 5 for completions in together)
    fewer = Engine(model, tokenizer).generate(TEXTS[:2], dataclasses.replace(params, n=2))
    assert fewer == [completions[:2] for completions in together[:2]]
    other = Engine(model, tokenizer).generate(TEXTS[:1], dataclasses.replace(params, seed=8))
    assert other[0] != together[0]


def test_samples_are_forked_from_one_reading(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer)
    engine.generate(["12 + 30 = "], SamplingParams(max_new_tokens=3, temperature=1.0, n=6, ignore_eos=True))
    assert engine.stats.prompt_tokens == 10
    assert engine.stats.generated_tokens == 18
    assert engine.stats.seconds == engine.stats.prefill_seconds + engine.stats.decode_seconds > 0
    assert engine.stats.tokens_per_second == pytest.approx(18 / engine.stats.seconds)


def test_a_prefix_state_equals_the_plain_prompt(model: MambaLM, tokenizer: Any) -> None:
    prefix = "Question: how many apples?\nAnswer: "
    engine, params = Engine(model, tokenizer, batch_size=6), SamplingParams(max_new_tokens=12)
    plain = engine.generate([prefix + text for text in TEXTS], params)
    state = engine.prefill(prefix)
    assert state.tokens.tolist() == [len(prefix)]
    assert engine.generate(TEXTS, params, state=state) == plain
    steps = engine.prefill(prefix[9:], state=engine.prefill(prefix[:9]))
    assert engine.generate(TEXTS, params, state=steps) == plain


def test_each_prompt_may_have_a_state_of_its_own(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, batch_size=3)
    params = SamplingParams(max_new_tokens=8)
    prefixes = [f"{i}: " * (i + 1) for i in range(5)]
    states = MambaState.cat([engine.prefill(prefix) for prefix in prefixes])
    plain = engine.generate([prefix + text for prefix, text in zip(prefixes, TEXTS, strict=False)], params)
    assert engine.generate(TEXTS[:5], params, state=states) == plain


def test_a_prefix_state_can_be_trained_through(model: MambaLM, tokenizer: Any) -> None:
    state = Engine(model, tokenizer).prefill("Question: ")
    ids = torch.tensor([tokenizer("2+2=4")["input_ids"]])
    model(ids, state=state, labels=ids).loss.backward()
    assert model.backbone.embeddings.weight.grad.abs().max() > 0
    model.zero_grad()


class Scripted(MambaLM):
    """A model that says a given text whatever it is asked, then ends."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(MambaConfig(d_model=8, n_layer=1, vocab_size=512))
        self.ids = [*ids, 0]

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        out = super().forward(input_ids, **kwargs)
        said = self.said = 0 if input_ids.shape[1] > 1 else self.said + 1
        logits = torch.zeros_like(out.logits)
        logits[..., self.ids[said]] = 1.0
        return out._replace(logits=logits)


@pytest.mark.parametrize(
    ("stop", "text", "reason", "tokens"),
    [
        ([], "The answer is 42.\n\nQuestion: é", "eos", 32),
        (["\n"], "The answer is 42.", "stop", 18),
        (["\n\n"], "The answer is 42.", "stop", 19),
        (["Question:", "\n\nQ"], "The answer is 42.", "stop", 20),
        (["42", "answer"], "The ", "stop", 10),
        (["nowhere"], "The answer is 42.\n\nQuestion: é", "eos", 32),
        (["é"], "The answer is 42.\n\nQuestion: ", "stop", 31),
        (["T"], "", "stop", 1),
    ],
)
def test_stop_strings_across_tokens(tokenizer: Any, stop: list[str], text: str, reason: str, tokens: int) -> None:
    model = Scripted(tokenizer("The answer is 42.\n\nQuestion: é")["input_ids"])
    [[completion]] = Engine(model, tokenizer).generate(["What?"], SamplingParams(max_new_tokens=50, stop=stop))
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == (text, reason, tokens)


def test_stop_strings_inside_and_across_long_tokens(data_dir: Path) -> None:
    """With merged tokens a stop string may begin and end inside tokens."""
    tokenizer = load_tokenizer("random:130m", data_dir=data_dir)
    said = "Therefore the answer is 1,234 apples.\n\nQuestion: next"
    ids = tokenizer(said)["input_ids"]
    model = MambaLM(MambaConfig(d_model=8, n_layer=1, vocab_size=50280))
    model.__class__ = Scripted
    model.ids = [*ids, 0]
    for stop in ("ore the", "apples.\n", "\n\nQ", "uest", " is 1,2", "s.\n\nQuestion: n"):
        [[completion]] = Engine(model, tokenizer).generate(["What now?"], SamplingParams(max_new_tokens=50, stop=stop))
        assert completion.text == said[: said.index(stop)]
        assert completion.finish_reason == "stop"
        assert stop in tokenizer.decode(completion.token_ids)
        assert stop not in tokenizer.decode(completion.token_ids[:-1])


def test_length_and_end_of_text(tokenizer: Any) -> None:
    model = Scripted(tokenizer("abc")["input_ids"])
    engine = Engine(model, tokenizer)
    for limit, text, reason, tokens in ((2, "ab", "length", 2), (3, "abc", "length", 3), (4, "abc", "eos", 4)):
        [[completion]] = engine.generate(["What?"], SamplingParams(max_new_tokens=limit))
        assert (completion.text, completion.finish_reason, len(completion.token_ids)) == (text, reason, tokens)


def test_ignore_eos_goes_on(tokenizer: Any) -> None:
    model = Scripted([0, 0, 5])
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    [[completion]] = Engine(model, tokenizer).generate(["What?"], params)
    assert completion.token_ids == [0, 0, 5] and completion.finish_reason == "length"


def test_token_ids_need_no_tokenizer(model: MambaLM, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=9)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = Engine(model, tokenizer).generate(TEXTS, params)
    got = Engine(model).generate(ids, params)
    assert [[c.token_ids for c in row] for row in got] == [[c.token_ids for c in row] for row in expected]
    assert got[0][0].text == ""


def test_an_empty_prompt_starts_a_document(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer)
    assert engine.generate([""], SamplingParams()) == engine.generate([[0]], SamplingParams())
    assert engine.generate([], SamplingParams()) == []


def test_progress_counts_prompts(model: MambaLM, tokenizer: Any) -> None:
    counts: list[int] = []
    Engine(model, tokenizer, batch_size=6).generate(TEXTS, SamplingParams(max_new_tokens=2), progress=counts.append)
    assert sum(counts) == len(TEXTS)


def test_dropout_is_off_while_generating_and_on_after(tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base, _ = load("random:micro")
    tuned = get_peft_model(base, LoraConfig(target_modules=["in_proj"], lora_dropout=0.9, task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.train()
    engine = Engine(tuned, tokenizer)
    first = engine.generate(TEXTS, SamplingParams(max_new_tokens=6))
    assert engine.generate(TEXTS, SamplingParams(max_new_tokens=6)) == first
    assert tuned.training
    with tuned.disable_adapter():
        assert engine.generate(TEXTS, SamplingParams(max_new_tokens=6)) != first


def test_faults_of_the_caller_are_named(model: MambaLM, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer)
    state = engine.prefill("abc")
    with pytest.raises(TypeError, match="expected a list of prompts"):
        engine.generate("one text", SamplingParams())
    with pytest.raises(UserError, match="empty prompt cannot follow a state"):
        engine.generate([""], SamplingParams(), state=state)
    with pytest.raises(UserError, match="expected 1 row or 3, one for each prompt, got 2"):
        engine.generate(TEXTS[:3], SamplingParams(), state=state.fork(2))
    with pytest.raises(UserError, match="conv_state: expected shape"):
        engine.generate(["a"], SamplingParams(), state=MambaState.zeros(load("random:micro")[0].config))
    with pytest.raises(UserError, match=r"token id 900: the model's vocabulary has 257"):
        engine.generate([[1, 900]], SamplingParams())
    with pytest.raises(UserError, match="needs a tokenizer"):
        Engine(model).generate(["a"], SamplingParams())
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        Engine(model).generate([[1]], SamplingParams(stop=["a"]))
    with pytest.raises(UserError, match="batch_size: expected >= 1"):
        Engine(model, tokenizer, batch_size=0)
    with pytest.raises(TypeError, match="expected a MambaLM"):
        Engine(torch.nn.Linear(2, 2), tokenizer)
