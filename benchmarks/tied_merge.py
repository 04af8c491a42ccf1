"""The destroyed model: merging a LoRA on the tied embedding, by transformers with PEFT and by Mambacus, on `tiny`.

Both sides train the same adapter (``embeddings`` and ``in_proj``) on the same word problems with the same optimiser,
each in its own model class, then merge. Prints and records the loss of the trained answers and the perplexity of
English prose: of the base, with the adapter attached, and merged.

    python benchmarks/tied_merge.py --out tied-merge.json
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mambacus.runtime.config import opt, parse
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Stopwatch, read_jsonl, write_record

TARGETS = ["embeddings", "in_proj"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the experiment."""

    out: Path = opt(help="record to write", metavar="FILE.json")
    problems: int = opt(16, "word problems that are trained, and whose loss is measured", least=1)
    steps: int = opt(60, "optimiser steps of four problems", least=1)
    lr: float = opt(3e-3, "learning rate", above=0)
    passages: int = opt(12, "English passages of up to 200 tokens", least=1)
    overwrite: bool = opt(False, "replace an existing record")


def texts(config: Config, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Return rows (ids, labels): the problems with only the answer labelled, and the passages with every token."""
    import torch

    from mambacus.data import wordproblems
    from mambacus.data.prompts import qa_completion, qa_prompt

    def row(prompt: str, rest: str) -> Any:
        start, end = (tokenizer(text)["input_ids"] for text in (prompt, rest))
        ids = torch.tensor([[*start, *end, tokenizer.eos_token_id][:200]])
        labels = ids.clone()
        labels[:, : len(start)] = -100
        return ids, labels

    problems = wordproblems.generate(config.problems, split="train", seed=0)
    asked = [row(qa_prompt(one.question), qa_completion(one.solution, one.answer)) for one in problems]
    with resources.as_file(resources.files("mambacus.data") / "text_sample" / "passages.jsonl") as path:
        prose = [row("", entry["text"]) for _, entry in read_jsonl(Path(path))][: config.passages]
    return asked, prose


def train(model: Any, rows: Sequence[Any], config: Config) -> None:
    """Train what requires a gradient, four problems a step."""
    import torch

    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr, weight_decay=0.0)
    for step in range(config.steps):
        for place in range(4):
            ids, labels = rows[(4 * step + place) % len(rows)]
            (model(input_ids=ids, labels=labels).loss / 4).backward()
        optimiser.step()
        optimiser.zero_grad()


def loss(model: Any, rows: Sequence[Any]) -> float:
    """Return the mean loss of the labelled tokens, in nats."""
    import torch

    total = count = 0.0
    with torch.no_grad():
        for ids, labels in rows:
            tokens = int((labels[:, 1:] != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * tokens
            count += tokens
    return total / count


def side(name: str, base: Any, attach: Any, merge: Any, rows: tuple[list[Any], list[Any]], config: Config) -> Any:
    """Train and merge one side's model and return its rows: the base, attached and merged."""
    import torch

    found = []

    def measure(stage: str, model: Any) -> None:
        answers, prose = (loss(model.eval(), part) for part in rows)
        found.append({"side": name, "stage": stage, "answer_loss": answers, "prose_perplexity": math.exp(prose)})

    measure("base", base)
    torch.manual_seed(0)
    attached = attach(base)
    train(attached.train(), rows[0], config)
    measure("attached", attached)
    measure("merged", merge(attached))
    return found


def run(config: Config) -> dict[str, Any]:
    """Return the rows of both sides, and how often PEFT warned of the tied matrix."""
    from peft import LoraConfig, get_peft_model
    from transformers import MambaForCausalLM, logging

    from mambacus.models import load, save
    from mambacus.tuning.merge import merge
    from mambacus.tuning.methods import METHODS, AdapterSettings

    logging.set_verbosity_error()
    model, tokenizer = load("tiny")
    rows = texts(config, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder), tokenizer)
        peer = MambaForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    settings = AdapterSettings(rank=16, alpha=32, dropout=0.0, targets=tuple(TARGETS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = side(
            "transformers + peft", peer, lambda base: get_peft_model(base, lora),
            lambda attached: attached.merge_and_unload(), rows, config,
        )  # fmt: skip
    about_ties = sum("tie" in str(each.message) for each in caught)
    print(f"warnings of peft about the tied matrix: {about_ties}")
    ours = side(
        "mambacus", model, lambda base: METHODS["lora"].attach(base, settings), lambda attached: merge(attached)[0],
        rows, config,
    )  # fmt: skip
    return {"rows": [*theirs, *ours], "peft_warnings_about_ties": about_ties}


def main(argv: Sequence[str]) -> None:
    """Run the experiment, print the table, write the record."""
    config = parse(Config, argv, "tied_merge.py", (__doc__ or "").splitlines()[0])
    claim_file(config.out, overwrite=config.overwrite)
    watch = Stopwatch()
    results = run(config)
    for row in results["rows"]:
        print(f"{row['side']:22}{row['stage']:10}{row['answer_loss']:12.4f}{row['prose_perplexity']:14.1f}")
    write_record(config.out, watch.record("tied-merge", "tiny", config, results))


if __name__ == "__main__":
    main(sys.argv[1:])
