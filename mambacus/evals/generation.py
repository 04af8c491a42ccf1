"""Completions of prompts that begin alike: the common beginning is read once, its state forked over the prompts.

`generate` finds whatever lm_eval's prompts share; `solve` reads the worked examples of a math bench, and nothing else,
ahead, so that a sampled completion depends on its own problem alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mambacus.evals.cache import CompletionCache
from mambacus.evals.prefixes import Fork
from mambacus.evals.scoring import Scorer
from mambacus.inference import Completion, Engine, SamplingParams
from mambacus.models import MambaState

BATCHES_PER_CALL = 8  # completions are handed on after so many batches, so that an interrupted run loses little


def generate(
    engine: Engine,
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    progress: Callable[[int], None] = lambda n: None,
    finished: Callable[[int, list[Completion]], object] = lambda number, completions: None,
) -> list[list[Completion]]:
    """Complete each prompt ``params.n`` times, as ``engine.generate`` does.

    Prompts are read whole where the scorer does not reuse states, and where a repetition penalty must know every token
    of the prompt. Sampled completions depend on the tokens read last: sharing or not gives other draws of equal law.

    Args:
        engine: generates.
        scorer: reads shared beginnings with the same model; its counts are added to.
        prompts: token ids, at least one each.
        params: how to choose tokens.
        progress: called with the number of prompts just finished.
        finished: called with the number of a prompt and its completions, a few batches at a time.

    Returns:
        For each prompt, in order, its completions.
    """
    scorer.counts.requests += len(prompts)
    scorer.counts.tokens_naive += sum(map(len, prompts))
    sequences = [tuple(prompt) for prompt in prompts]
    whole = [*range(len(prompts))]
    unshared = [Fork(whole, [0] * len(whole), [0] * len(whole), None)] if whole else []
    shares = scorer.state_reuse and params.repetition_penalty == 1.0
    found: dict[int, list[Completion]] = {}
    for fork in scorer.forks(sequences) if shares else unshared:
        rests = [sequences[member][depth:] for member, depth in zip(fork.members, fork.depths, strict=True)]
        scorer.counts.tokens_read += sum(map(len, rests))
        one_row = fork.state is not None and len(set(fork.rows)) == 1
        batches = BATCHES_PER_CALL if fork.state is None or one_row else 1  # a state for every prompt would not fit
        size = max(1, batches * engine.batch_size // params.n)
        order = sorted(range(len(rests)), key=lambda place: -len(rests[place]))  # so that a batch pads little
        for begin in range(0, len(order), size):
            places = order[begin : begin + size]
            rows = [fork.rows[place] for place in places]
            state = None if fork.state is None else fork.state.select(rows[:1] if one_row else rows)
            completions = engine.generate([rests[place] for place in places], params, state, progress=progress)
            for place, done in zip(places, completions, strict=True):
                found[fork.members[place]] = done
                finished(fork.members[place], done)
    return [found[number] for number in whole]


def solve(
    engine: Any,
    prompts: Sequence[str],
    examples: str,
    params: SamplingParams,
    cache: CompletionCache,
    progress: Callable[[int], None] = lambda n: None,
    state: MambaState | None = None,
) -> list[list[Completion]]:
    """Complete each prompt ``params.n`` times after the worked examples, from the cache where it has been done.

    Args:
        engine: ours, which reads the examples once, or a `baselines.BaselineEngine`, which reads them each time.
        prompts: texts.
        examples: text before every prompt, or an empty one.
        params: how to choose tokens.
        cache: asked first, and told of what is found a few batches at a time.
        progress: called with the number of prompts just finished.
        state: our engine goes on from it (one row); a cache must know it by its file's name.
    """
    found = {text: done for text in dict.fromkeys(prompts) if (done := cache.get(examples + text, params)) is not None}
    progress(sum(text in found for text in prompts))
    pending = [text for text in dict.fromkeys(prompts) if text not in found]
    pending.sort(key=len, reverse=True)
    shared, start = _examples_read(engine, pending, examples, state)
    size = max(1, BATCHES_PER_CALL * engine.batch_size // params.n)
    for begin in range(0, len(pending), size):
        texts = pending[begin : begin + size]
        if start is None:
            completions = engine.generate([examples + text for text in texts], params, progress=progress)
        else:
            rests = [engine.encode(examples + text, continues=True)[shared:] for text in texts]
            completions = engine.generate(rests, params, start, progress=progress)
        for text, done in zip(texts, completions, strict=True):
            found[text] = done
            cache.put(examples + text, params, done)
    return [found[text] for text in prompts]


def _examples_read(
    engine: Any, prompts: Sequence[str], examples: str, state: MambaState | None
) -> tuple[int, MambaState | None]:
    """Return how many tokens of every text our engine has read in the returned state; None: it starts from nothing."""
    if not isinstance(engine, Engine) or not prompts or not examples:
        return 0, state
    shared = engine.encode(
        examples.rstrip(), continues=True
    )  # how the line breaks after it are cut depends on what follows
    if any(engine.encode(examples + text, continues=True)[: len(shared)] != shared for text in prompts):
        return 0, state
    return len(shared), engine.prefill(shared, state)
