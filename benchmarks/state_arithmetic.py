"""Arithmetic on compiled prompts: is the mean of two states a prompt with the examples of both?

Compiles two sets of worked examples, and both in a row, and measures the log-likelihood of worked answers after each
state, after mixtures of the two and after other references. Prints a table and writes one JSON record.

    python benchmarks/state_arithmetic.py --model tiny --out arithmetic.json
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mambacus.runtime.config import opt, parse
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Stopwatch, write_record

MIXTURES = (0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the experiment."""

    out: Path = opt(help="record to write", metavar="FILE.json")
    model: str = opt("tiny", help="tiny, a model folder, a hub id or random:SIZE")
    shots: int = opt(4, "worked examples of each set", least=1)
    problems: int = opt(48, "held-out problems", least=2)
    seed: int = opt(0, "seed of examples and problems", least=0)
    overwrite: bool = opt(False, "replace an existing record")


def mixed(one: Any, two: Any, share: float) -> Any:
    """Return ``(1 - share) * one + share * two``, states of one row."""
    return dataclasses.replace(
        one,
        conv_state=torch_lerp(one.conv_state, two.conv_state, share),
        ssm_state=torch_lerp(one.ssm_state, two.ssm_state, share),
    )


def torch_lerp(one: Any, two: Any, share: float) -> Any:
    """Return the mixture of two tensors."""
    return one + share * (two - one)


def measure(config: Config) -> dict[str, Any]:
    """Return, for each start, the mean log-likelihood of an answer's token in nats and its paired gain over nothing."""
    from mambacus.data import wordproblems
    from mambacus.data.prompts import qa_completion
    from mambacus.evals.scoring import Counts, Scorer
    from mambacus.inference import Engine
    from mambacus.models import load
    from mambacus.models.primed import PrimedModel
    from mambacus.prompts import DEFAULT, Exemplar, Prompt
    from mambacus.prompts.prompt import encode

    model, tokenizer = load(config.model)
    engine = Engine(model, tokenizer)
    shown = [Exemplar.of(p) for p in wordproblems.generate(2 * config.shots, "train", config.seed + 1_000_003)]
    sets = {"A": shown[: config.shots], "B": shown[config.shots :], "A then B": shown}
    prompts = {name: Prompt(exemplars=tuple(examples)) for name, examples in sets.items()}
    states = {name: engine.prefill(encode(tokenizer, prompt.prefix)) for name, prompt in prompts.items()}
    for share in MIXTURES:
        states[f"{1 - share:.2f} A + {share:.2f} B"] = mixed(states["A"], states["B"], share)
    states["A + B"] = dataclasses.replace(
        states["A"],
        conv_state=states["B"].conv_state,
        ssm_state=states["A"].ssm_state + states["B"].ssm_state,
    )
    states["0.50 A"] = dataclasses.replace(states["A"], ssm_state=0.5 * states["A"].ssm_state)
    problems = wordproblems.generate(config.problems, "test", config.seed)
    golds = [tuple(encode(tokenizer, qa_completion(p.solution, p.answer))) for p in problems]
    tokens = sum(map(len, golds))

    def score(reader: Any, prompt: Prompt, whole: bool) -> np.ndarray:
        texts = [prompt.text(p.question) if whole else prompt.query(p.question) for p in problems]
        pairs = [(tuple(encode(tokenizer, text)), gold) for text, gold in zip(texts, golds, strict=True)]
        return np.array([found.loglikelihood for found in Scorer(reader, 16, False, Counts()).score(pairs)])

    nothing = score(model, DEFAULT, whole=True)
    found = {"nothing (0-shot)": nothing}
    found |= {name: score(PrimedModel(model, state), prompts["A"], whole=False) for name, state in states.items()}
    rows = {}
    for name, scores in found.items():
        gain = scores - nothing
        rows[name] = {
            "nats_a_token": float(scores.sum() / tokens),
            "gain_a_problem": float(gain.mean()),
            "standard_error": float(gain.std(ddof=1) / len(gain) ** 0.5),
        }
    return {"problems": len(problems), "answer_tokens": tokens, "rows": rows}


def main() -> None:
    """Run the experiment."""
    config = parse(Config, sys.argv[1:], "state_arithmetic", (__doc__ or "").splitlines()[0])
    claim_file(config.out, overwrite=config.overwrite)
    watch = Stopwatch()
    results = measure(config)
    write_record(config.out, watch.record("state-arithmetic", config.model, config, results))
    print(f"{'start':<20} {'nats a token':>12} {'gain a problem':>15}   n {results['problems']}")
    for name, row in results["rows"].items():
        gain = f"{row['gain_a_problem']:+.2f} ± {row['standard_error']:.2f}"
        print(f"{name:<20} {row['nats_a_token']:>12.3f} {gain:>15}")


if __name__ == "__main__":
    main()
