"""What a fine-tuning gained and what it cost: the same questions put to the base and to the tuned model, in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mambacus.runtime import stats
from mambacus.runtime.records import read_json, write_json_atomic

BEFORE = "check-before.json"
ZERO_SHOT = ("arc_easy", "hellaswag")  # asked where --data-dir has them
Answers = dict[str, list[list[float]]]  # what was asked -> one row of numbers for each item


@dataclasses.dataclass(frozen=True)
class Questions:
    """What is asked before and after.

    Attributes:
        bench: math set whose test problems are solved and scored; empty for none.
        count: problems, passages and questions of each kind at most.
        data_dir: folder of the sets.
        max_new_tokens: longest answer.
        max_length: longest problem with its solution, in tokens.
    """

    bench: str
    count: int
    data_dir: Path | None
    max_new_tokens: int = 160
    max_length: int = 1024

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, as lm_eval knows them."""
        if self.data_dir is None:
            return ["text_sample"]
        folder = self.data_dir / "zeroshot"
        return ["text_sample", *(name for name in ZERO_SHOT if any(folder.glob(f"{name}*")))]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the questions: answers may be compared where it is equal."""
        folder = None if self.data_dir is None else str(self.data_dir.resolve())
        return dataclasses.asdict(self) | {"data_dir": folder, "tasks": self.tasks}


def choose_questions(data: str, held_out: str, count: int, data_dir: Path | None, max_length: int) -> Questions:
    """Return the questions for a run: those of ``held_out``, else of the test split of the set trained on."""
    from mambacus.evals.math import BENCHES

    name = held_out or data.partition(":")[0]
    return Questions(name if held_out or name in BENCHES else "", count, data_dir, max_length=max_length)


def ask(model: Any, tokenizer: Any, questions: Questions) -> Answers:
    """Return every answer of ``model``: numbers per item, in an order that does not depend on the model.

    ``answer_loss``: [sum of the solution's log-likelihood in nats, tokens]; ``accuracy``: [1 or 0]; ``text``: [log
    likelihood, words]; each zero-shot task: [1 or 0].
    """
    training = model.training
    model.eval()
    answers = _math(model, tokenizer, questions) if questions.bench else {}
    answers |= _tasks(model, tokenizer, questions)
    model.train(training)
    return answers


def _math(model: Any, tokenizer: Any, questions: Questions) -> Answers:
    import torch

    from mambacus.data.prompts import qa_completion, qa_prompt
    from mambacus.evals.math import BENCHES, grade, load_problems, prompt, stops
    from mambacus.inference import Engine, SamplingParams
    from mambacus.tuning.data import IGNORED, Example, encode
    from mambacus.tuning.packing import collate

    problems = load_problems(questions.bench, questions.data_dir, questions.count, 0)
    texts = [Example(qa_prompt(p.question, p.options), qa_completion(p.solution, p.answer)) for p in problems]
    losses = []
    for sample in encode(texts, tokenizer, max_length=questions.max_length)[0]:
        batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in collate([[sample]]).items()}
        with torch.no_grad():
            loss = model(**batch, loss_only=True).loss
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        losses.append([-float(loss) * tokens, float(tokens)])
    engine = Engine(model, tokenizer, batch_size=25)
    params = SamplingParams(max_new_tokens=questions.max_new_tokens, temperature=0.0, stop=list(stops("cot")), seed=0)
    found = engine.generate([prompt(problem, "cot") for problem in problems], params)
    latex = getattr(BENCHES[questions.bench], "latex", False)
    right = [
        [float(grade(problem, completion.text, "cot", latex=latex).correct)]
        for problem, (completion,) in zip(problems, found, strict=True)
    ]
    return {f"answer_loss:{questions.bench}": losses, f"accuracy:{questions.bench}": right}


def _tasks(model: Any, tokenizer: Any, questions: Questions) -> Answers:
    from lm_eval import simple_evaluate

    from mambacus.evals.catalogue import load_tasks, quiet
    from mambacus.evals.harness import MambacusLM

    tasks, manager = load_tasks(questions.tasks, questions.data_dir)
    with quiet():
        found = simple_evaluate(
            model=MambacusLM(model, tokenizer), tasks=tasks, task_manager=manager, limit=questions.count,
            bootstrap_iters=0, random_seed=0, numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0,
        )  # fmt: skip
    answers: Answers = {}
    for name, rows in found["samples"].items():
        rows = sorted(rows, key=lambda row: row["doc_id"])
        if name == "text_sample":
            answers["text"] = [[float(part) for part in row["word_perplexity"]] for row in rows]
        else:
            answers[f"task:{name}"] = [[float(row["acc"])] for row in rows]
    return answers


def compare(before: Mapping[str, Sequence[Any]], after: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return ``{what: {before, after, change, low95, high95, n, better}}`` for the record; intervals are paired.

    ``answer_loss`` in nats a token and ``text`` as word perplexity are better when lower, the others when higher. An
    interval that holds 0 says that the change may be chance.
    """
    import numpy as np

    results = {}
    for what in before:
        one, other = (np.array(rows, dtype=np.float64) for rows in (before[what], after[what]))
        statistic = stats.perplexity if what == "text" else _nats if what.startswith("answer_loss") else stats.mean
        change = stats.paired_bootstrap(one, other, statistic)
        results[what] = {
            "before": statistic(one),
            "after": statistic(other),
            "change": change.estimate,
            "low95": change.low,
            "high95": change.high,
            "n": len(one),
            "better": "higher" if statistic is stats.mean else "lower",
        }
    return results


def _nats(rows: Any) -> float:
    return float(-rows[:, 0].sum() / rows[:, 1].sum())


def answers_of_base(out: Path, model: str, device: Any, questions: Questions) -> Answers:
    """Return the base model's answers: those in ``out`` if they are to the same questions, else new ones.

    New ones are written there, in the place of answers that an earlier attempt got to other questions.
    """
    import torch

    from mambacus.models import load

    path = out / BEFORE
    if path.is_file():
        stored = read_json(path)
        if stored.get("questions") == questions.identity:
            kept: Answers = stored["answers"]
            return kept
    base, tokenizer = load(model, device=device, dtype=torch.float32)
    answers = ask(base, tokenizer, questions)
    write_json_atomic(path, {"questions": questions.identity, "answers": answers})
    return answers


def summary(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line for each comparison, gain first."""
    lines = []
    for what, found in results.items():
        name = {"text": "word perplexity of text"}.get(what, what.replace("_", " ").replace(":", " on "))
        sure = found["low95"] > 0 or found["high95"] < 0
        good = (found["change"] > 0) == (found["better"] == "higher")
        verdict = ("gain" if good else "cost") if sure else "no sure change"
        interval = f"95 % {found['low95']:+.3g} to {found['high95']:+.3g}, n {found['n']}"
        lines.append(f"{name}: {found['before']:.4g} -> {found['after']:.4g} ({interval}): {verdict}")
    return lines
