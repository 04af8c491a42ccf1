"""The prefix cache: what it saves, that the text is the same, and that its size is bounded."""

from __future__ import annotations

from typing import Any

from mambacus.inference import Engine, SamplingParams
from mambacus.inference.prefix_cache import PrefixCache
from mambacus.models import MambaLM, MambaState
from mambacus.models.primed import PrimedModel

SYSTEM = "You are a calculator; answer with a number and nothing else.\n"
PARAMS = SamplingParams(max_new_tokens=7, ignore_eos=True)


def cached(model: MambaLM, tokenizer: Any, size: int = 1 << 24) -> Engine:
    return Engine(model, tokenizer, prefix_cache_bytes=size)


def plain(model: MambaLM, tokenizer: Any, text: str | list[int]) -> Any:
    return Engine(model, tokenizer).generate([text], PARAMS)


def test_a_conversation_reads_only_what_is_new(model: MambaLM, tokenizer: Any) -> None:
    engine, ids = cached(model, tokenizer), list(tokenizer(SYSTEM)["input_ids"])
    for turn in range(4):
        ids += tokenizer(f"User: {turn}+{turn}\nBot:")["input_ids"]
        before = engine.stats.prompt_tokens
        [[found]] = engine.generate([ids], PARAMS)
        assert [[found]] == plain(model, tokenizer, ids)
        if turn:  # the last token of the answer before, which was chosen but never read, and the new ones
            assert engine.stats.prompt_tokens - before == 1 + len("User: 0+0\nBot:")
        ids += found.token_ids


def test_the_same_prompt_again_is_not_read_at_all(model: MambaLM, tokenizer: Any) -> None:
    engine = cached(model, tokenizer)
    first = engine.generate([SYSTEM], PARAMS)
    read = engine.stats.prompt_tokens
    assert engine.generate([SYSTEM], PARAMS) == first and engine.stats.prompt_tokens == read


def test_a_common_beginning_is_kept_once_it_shows(model: MambaLM, tokenizer: Any) -> None:
    engine = cached(model, tokenizer)
    texts = [SYSTEM + question for question in ("7 + 8 =", "12 apples", "99 - 1", "three")]
    for number, text in enumerate(texts):
        before = engine.stats.prompt_tokens
        assert engine.generate([text], PARAMS) == plain(model, tokenizer, text)
        expected = len(text) if number < 2 else len(text) - len(SYSTEM)
        assert engine.stats.prompt_tokens - before == expected
    assert engine.prefix_cache is not None and engine.prefix_cache.tokens_saved == 2 * len(SYSTEM)


def test_states_from_outside_are_not_mistaken_for_beginnings(model: MambaLM, tokenizer: Any) -> None:
    engine = cached(model, tokenizer)
    state = engine.prefill("something else")
    after = engine.generate([SYSTEM], PARAMS, state)
    assert engine.generate([SYSTEM], PARAMS) == plain(model, tokenizer, SYSTEM) != after


def test_the_least_recently_used_leaves_first(model: MambaLM) -> None:
    state = MambaState.zeros(model.config)
    size = state.nbytes + 8 * 40
    cache = PrefixCache(3 * size)
    texts = [[number] * 40 for number in range(5)]
    for text in texts[:3]:
        cache.add(text, state)
    assert cache.plan([*texts[0], 9]).entry is not None  # used just now
    cache.add(texts[3], state)
    held = [cache.plan([*text, 9]).entry is not None for text in texts]
    assert held == [True, False, True, True, False]
    assert cache.nbytes == 3 * size and len(cache) == 3
    cache.add(texts[3], state)
    assert cache.nbytes == 3 * size  # known: not counted twice
    small = PrefixCache(size - 1)
    small.add(texts[0], state)  # too large to be kept at all
    assert len(small) == small.nbytes == 0


def test_a_state_in_the_cache_does_not_hold_the_batch_it_came_from(model: MambaLM, tokenizer: Any) -> None:
    engine = cached(model, tokenizer)
    engine.generate([SYSTEM + str(i) for i in range(8)], PARAMS)
    assert engine.prefix_cache is not None
    for entry in engine.prefix_cache._entries.values():
        assert entry.state.ssm_state.untyped_storage().nbytes() == entry.state.ssm_state.nbytes


def test_documents_of_a_primed_model_begin_from_its_state_also_beside_cached_ones(
    model: MambaLM, tokenizer: Any
) -> None:
    primed = PrimedModel(model, Engine(model, tokenizer).prefill("Always be brief. "))
    engine = Engine(primed, tokenizer, prefix_cache_bytes=1 << 24)
    first = engine.generate([SYSTEM], PARAMS)
    assert first == Engine(model, tokenizer).generate(["Always be brief. " + SYSTEM], PARAMS)
    both = engine.generate([SYSTEM + "7", "new"], PARAMS)
    assert both == [
        Engine(model, tokenizer).generate(["Always be brief. " + t], PARAMS)[0] for t in (SYSTEM + "7", "new")
    ]
    assert engine.prefix_cache is not None and engine.prefix_cache.hits == 1
