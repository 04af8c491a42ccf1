"""The numbers of lm_eval's ``hf`` model on the same checkpoint, request by request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from mambacus.evals.catalogue import load_tasks
from mambacus.evals.harness import MambacusLM
from mambacus.runtime.errors import UserError

MAX_LENGTH = 384
CHOICES = ["arc_easy", "arc_challenge", "hellaswag", "cola", "openbookqa", "mathqa", "winogrande", "piqa"]


def instance(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("", 0, 1))  # type: ignore[arg-type]


def reference_lm(checkpoint: Any, batch_size: int = 16) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=checkpoint.reference, tokenizer=checkpoint.tokenizer, batch_size=batch_size, max_length=MAX_LENGTH
    )


def our_lm(checkpoint: Any, **options: Any) -> MambacusLM:
    return MambacusLM(checkpoint.model, checkpoint.tokenizer, max_length=MAX_LENGTH, **options)


@pytest.fixture(scope="session")
def loglikelihoods(checkpoint: Any, small_data: Path) -> tuple[list[Instance], list[tuple[float, bool]]]:
    """Requests of real tasks and awkward ones, with the answers of lm_eval's ``hf`` model."""
    tasks, _ = load_tasks([*CHOICES, "lambada_openai"], small_data)
    requests = []
    for task in tasks:
        task.set_fewshot_seed(1234)
        task.config.num_fewshot = 1 if task.config.task == "cola" else 0
        task.build_all_requests(limit=2)
        requests += task.instances
    requests += [
        instance("loglikelihood", "", "An empty context"),
        instance("loglikelihood", "A trailing space ", "moves"),
        instance("loglikelihood", "<|endoftext|>It brings its own", " prefix"),
        instance("loglikelihood", "long " * 100, " " + "cut " * 20),
        instance("loglikelihood", "naïve — “text”", " ünïcode"),
    ]
    return requests, reference_lm(checkpoint).loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("state_reuse", [True, False])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_loglikelihoods_are_those_of_hf(
    checkpoint: Any, loglikelihoods: Any, batch_size: int, state_reuse: bool
) -> None:
    requests, expected = loglikelihoods
    lm = our_lm(checkpoint, batch_size=batch_size, state_reuse=state_reuse)
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4, rel=0)
    record = lm.state_reuse_record()
    assert record["truncated_requests"] >= 1
    assert (record["tokens_saved"] > 0) is state_reuse


def test_loglikelihoods_of_hf_one_at_a_time(checkpoint: Any, loglikelihoods: Any) -> None:
    requests, _ = loglikelihoods
    short = sorted(requests, key=lambda request: len("".join(request.args)))[:12]
    expected = reference_lm(checkpoint, batch_size=1).loglikelihood(short, disable_tqdm=True)
    found = our_lm(checkpoint).loglikelihood(short, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4, rel=0)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_rolling_windows_are_those_of_hf(checkpoint: Any, small_data: Path, batch_size: int) -> None:
    (task,), _ = load_tasks(["wikitext"], small_data)
    pages = [task.doc_to_target(doc) for doc in task.test_docs()]
    texts = [pages[0][:900], pages[1][:MAX_LENGTH], pages[2][: MAX_LENGTH + 1], pages[3][:5], "x"]
    requests = [instance("loglikelihood_rolling", text) for text in texts]
    expected = reference_lm(checkpoint).loglikelihood_rolling(requests, disable_tqdm=True)
    lm = our_lm(checkpoint, batch_size=batch_size)
    found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    # hf adds hundreds of float32 log-probabilities up in float32; a millionth of the sum is its own rounding
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-4)
    assert lm.counts.requests > len(texts)  # the long texts were several windows


def test_a_long_window_is_a_whole_document(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from state to state, it has the likelihood of one pass over all of it."""
    import torch

    from mambacus.evals import scoring

    text = "A document that is longer than any window. " * 20
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 100 * 4 * checkpoint.model.config.padded_vocab_size)
    lm = MambacusLM(checkpoint.model, checkpoint.tokenizer, max_length=10**6)
    (found,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    tokens = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(text)]])
    with torch.inference_mode():
        expected = checkpoint.model(tokens).logits.double().log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])
    assert found == pytest.approx(float(expected.sum()), rel=1e-6)
    assert lm.counts.requests == 1 and lm.counts.passes > 5


@pytest.mark.parametrize("batch_size", [1, 16])
def test_greedy_generations_are_those_of_hf(checkpoint: Any, small_data: Path, batch_size: int) -> None:
    (task,), _ = load_tasks(["gsm8k"], small_data)
    task.set_fewshot_seed(1234)
    task.config.num_fewshot = 1  # about a thousand bytes: cut on the left
    task.build_all_requests(limit=2)
    settings = {"until": ["e", "\n"], "max_gen_toks": 40, "do_sample": False}
    requests = [
        *task.instances,
        *(
            instance("generate_until", text, settings)
            for text in ("Once", "A longer prompt, then", "2 + 2 =", "x " * 90)
        ),
    ]
    expected = reference_lm(checkpoint).generate_until(requests, disable_tqdm=True)
    found = our_lm(checkpoint, batch_size=batch_size).generate_until(requests, disable_tqdm=True)
    assert found == expected
    assert any(found)


@pytest.mark.parametrize("state_bytes", [1, 2**30])
def test_worked_examples_are_read_once_for_generation(checkpoint: Any, state_bytes: int) -> None:
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    examples = [
        "".join(f"Question: {n} + {n}\nAnswer: {2 * n}\n\n" for n in range(first, first + 4)) for first in (1, 5)
    ]
    prompts = [f"{examples[n % 2]}Question: {n} + 1\nAnswer:" for n in range(12)]
    requests = [instance("generate_until", text, settings) for text in [*prompts, "Once"]]
    lms = [our_lm(checkpoint, batch_size=4, state_reuse=reuse, state_bytes=state_bytes) for reuse in (True, False)]
    shared, whole = (lm.generate_until(requests) for lm in lms)
    assert shared == whole == reference_lm(checkpoint).generate_until(requests, disable_tqdm=True)
    counts = lms[0].state_reuse_record()
    assert counts["tokens_naive"] == counts["prompt_tokens"] == lms[1].counts.tokens_read
    assert counts["tokens_naive"] > 3 * counts["tokens_read"]
    assert lms[1].counts.prefixes == 0 < counts["prefixes"]


def test_sampled_generation_repeats_with_its_seed(checkpoint: Any) -> None:
    requests = [instance("generate_until", "Once", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})]
    texts = [our_lm(checkpoint, seed=seed).generate_until(requests) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_what_it_cannot_honour_is_an_error(checkpoint: Any) -> None:
    lm = our_lm(checkpoint)
    with pytest.raises(UserError, match="num_beams"):
        lm.generate_until([instance("generate_until", "Once", {"num_beams": 3})])
    with pytest.raises(UserError, match="no room for a prompt"):
        lm.generate_until([instance("generate_until", "Once", {"max_gen_toks": MAX_LENGTH})])
    with pytest.raises(UserError, match="exceeds --max-length"):
        lm.loglikelihood([instance("loglikelihood", "Once", "x" * (MAX_LENGTH + 1))])


def test_adapters_are_scored(checkpoint: Any, loglikelihoods: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from mambacus.models import load

    model, _ = load(checkpoint.folder)
    adapted = get_peft_model(model, LoraConfig(target_modules=["in_proj"], init_lora_weights=False)).eval()
    requests, base = loglikelihoods
    found = MambacusLM(adapted, checkpoint.tokenizer, max_length=MAX_LENGTH).loglikelihood(requests[:8])
    assert [value for value, _ in found] != pytest.approx([value for value, _ in base[:8]], abs=1e-3)
    with torch.no_grad():
        merged = adapted.merge_and_unload()
    same = MambacusLM(merged, checkpoint.tokenizer, max_length=MAX_LENGTH).loglikelihood(requests[:8])
    assert [value for value, _ in found] == pytest.approx([value for value, _ in same], abs=1e-3)
