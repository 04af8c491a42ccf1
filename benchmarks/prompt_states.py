"""What a compiled prompt saves, and what tuning its state gains: every way to ask the same held-out word problems.

Asks without examples, with worked examples as text, from the compiled state of that text, from that state after
tuning, and after tuning it together with a state-offset adapter; and, for comparison, from the tuned state of the
prompt without examples. Compares each with the compiled state item by item. Prints a table and writes one JSON record.

    python benchmarks/prompt_states.py --model tiny --out states.json
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from mambacus import prompt_compile, prompt_tune, solve
from mambacus.runtime.config import opt, parse
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, read_jsonl, write_record

COMPILED, TEXT = "examples, compiled", "examples, as text"


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the experiment."""

    out: Path = opt(help="record to write", metavar="FILE.json")
    model: str = opt("tiny", help="tiny, a model folder, a hub id or random:SIZE")
    shots: int = opt(8, "worked examples", least=1)
    rows: int = opt(600, "training word problems that states are tuned on, the last 64 only to measure", least=65)
    lr: float = opt(0.01, "peak learning rate", above=0)
    batch_size: int = opt(8, "samples in one step of the tuning", least=1)
    problems: int = opt(200, "test problems", least=2)
    max_new_tokens: int = opt(64, "longest completion in tokens", least=1)
    seed: int = opt(0, "seed of examples and training problems", least=0)
    device: str = opt("auto", "auto, cpu or cuda")
    overwrite: bool = opt(False, "replace an existing record")


def states(config: Config, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Record]]:
    """Compile and tune; return, by name, the flags that `solve` is asked with, and the records of the tuning."""
    from mambacus.data import wordproblems
    from mambacus.prompts import DEFAULT, Exemplar, Prompt, write_prompt

    shown = tuple(map(Exemplar.of, wordproblems.generate(config.shots, "train", config.seed + 1_000_003)))
    for name, prompt in (("shown", Prompt(exemplars=shown)), ("plain", DEFAULT)):
        write_prompt(folder / f"{name}.yaml", prompt)
        files = folder / f"{name}.yaml", folder / f"{name}.state"
        prompt_compile.run(prompt_compile.Config(config.model, *files, device=config.device))

    def tune(start: str, out: str, offset: bool = False) -> Record:
        return prompt_tune.run(
            prompt_tune.Config(
                config.model, folder / f"{start}.state", f"wordproblems:{config.rows}", folder / out, offset=offset,
                lr=config.lr, batch_size=config.batch_size, seed=config.seed, device=config.device,
            )
        )  # fmt: skip

    tuned = {
        "examples, tuned": tune("shown", "tuned"),
        "examples, tuned with offset": tune("shown", "offset", offset=True),
        "no examples, tuned": tune("plain", "bare"),
    }
    asked: dict[str, dict[str, Any]] = {
        "no examples": {},
        TEXT: {"prompt": folder / "shown.yaml"},
        COMPILED: {"state": folder / "shown.state"},
        "examples, tuned": {"state": folder / "tuned/prompt.state"},
        "examples, tuned with offset": {"state": folder / "offset/prompt.state", "adapter": folder / "offset/adapter"},
        "no examples, tuned": {"state": folder / "bare/prompt.state"},
    }
    return asked, tuned


def measure(config: Config, folder: Path) -> dict[str, Any]:
    """Return accuracy, prompt tokens and paired comparison of every way to ask."""
    from mambacus.prompts.choice import paired

    asked, tuned = states(config, folder)
    rows: dict[str, dict[str, Any]] = {}
    items: dict[str, list[dict[str, Any]]] = {}
    for number, (name, flags) in enumerate(asked.items()):
        out = folder / f"{number}.json"
        options: dict[str, Any] = {"limit": config.problems, "max_new_tokens": config.max_new_tokens, **flags}
        results = solve.run(solve.Config(config.model, ("wordproblems",), out, device=config.device, **options)).results
        items[name] = [item for _, item in read_jsonl(folder / f"{number}.items.jsonl")]
        figures = results["benches"]["wordproblems"]
        rows[name] = {key: figures[key] for key in ("n", "correct", "accuracy", "wilson95")}
        rows[name]["prompt_tokens_read"] = results["prompt_tokens"]
        if name in tuned:
            rows[name] |= {key: tuned[name].results[key] for key in ("held_out", "parameters")}
    right = {name: [item["correct"] for item in found] for name, found in items.items()}
    for name, row in rows.items():
        if name != COMPILED:
            row["against_compiled"] = paired(right[COMPILED], right[name])
    same = sum(one["completion"] == two["completion"] for one, two in zip(items[TEXT], items[COMPILED], strict=True))
    return {"rows": rows, "compiled": {"same_completions": same} | _tokens(config, folder, items[TEXT])}


def _tokens(config: Config, folder: Path, items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the tokens of all prompts read whole, and of what the state has read."""
    from mambacus.models import load_tokenizer
    from mambacus.prompts import read_prompt
    from mambacus.prompts.prompt import compile_tokens, encode

    tokenizer = load_tokenizer(config.model)
    prefix = compile_tokens(read_prompt(folder / "shown.yaml"), tokenizer, [items[0]["question"]])
    return {"prefix_tokens": len(prefix), "whole_tokens": sum(len(encode(tokenizer, item["prompt"])) for item in items)}


def main() -> None:
    """Run the experiment."""
    config = parse(Config, sys.argv[1:], "prompt_states", (__doc__ or "").splitlines()[0])
    claim_file(config.out, overwrite=config.overwrite)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(config, Path(folder))
    write_record(config.out, watch.record("prompt-states", Path(config.model).name, config, results))
    print(f"{'asked with':<28} {'accuracy':>24} {'against compiled':>24} {'prompt tokens':>14}")
    for name, row in results["rows"].items():
        low, high = row["wilson95"]
        share = f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
        other = row.get("against_compiled")
        change = "" if other is None else f"{other['difference']:+.1%} [{other['low']:+.1%}, {other['high']:+.1%}]"
        print(f"{name:<28} {share:>24} {change:>24} {row['prompt_tokens_read']:>14,}")
    compiled = results["compiled"]
    print(
        f"compiled: {compiled['same_completions']} of {config.problems} completions as with the text; "
        f"all prompts whole: {compiled['whole_tokens']:,} tokens"
    )


if __name__ == "__main__":
    main()
