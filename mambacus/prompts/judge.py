"""Scoring prompts with a model: each prefix is read once, its state forked over the questions, every token counted."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mambacus.data.problems import MathProblem
from mambacus.data.prompts import qa_completion
from mambacus.inference import Engine, SamplingParams
from mambacus.models import MambaState
from mambacus.models.primed import PrimedModel
from mambacus.prompts.journal import Journal, prompt_key
from mambacus.prompts.prompt import Prompt, encode, query_tokens, question_of
from mambacus.prompts.search import BudgetSpentError

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # context and continuation
Loglikelihoods = Callable[[nn.Module, Sequence[Pair]], Sequence[float]]
Grade = Callable[[MathProblem, str], bool]


@dataclasses.dataclass
class Tokens:
    """What a model has read and written.

    Attributes:
        read: prompt and gold tokens read.
        generated: tokens generated.
        naive: what reading every prompt whole would have come to, generated tokens included.
        unaligned: questions whose tokens do not follow those of the prefix, read whole.
    """

    read: int = 0
    generated: int = 0
    naive: int = 0
    unaligned: int = 0

    @property
    def forward(self) -> int:
        """Tokens that went through the model."""
        return self.read + self.generated

    def add(self, other: Tokens) -> None:
        """Add the counts of ``other``."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, with how many times fewer tokens than without reuse of states."""
        ratio = self.naive / self.forward if self.forward else 1.0
        return dataclasses.asdict(self) | {"forward": self.forward, "times_fewer": ratio}


@dataclasses.dataclass(frozen=True)
class Answer:
    """A greedy completion and whether it is right."""

    id: str
    completion: str
    correct: bool
    tokens: int


class PrefixStates:
    """States after beginnings of prompts; above a number of bytes the least recently used are dropped.

    Those after parts of a prefix go first: they serve edits alone, one after a whole prefix every later rung.

    Args:
        engine: reads.
        max_bytes: of all states held.
    """

    def __init__(self, engine: Engine, max_bytes: int) -> None:
        self._engine = engine
        model: Any = engine.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._most = max(1, max_bytes // MambaState.zeros(base.config, dtype=base.dtype).nbytes)
        self._states: OrderedDict[tuple[int, ...], MambaState | None] = OrderedDict()
        self._whole: set[tuple[int, ...]] = set()

    def charge(self, prompt: Prompt, ids: Sequence[int]) -> tuple[list[int], int]:
        """Hold places for the states after the prompt's beginnings, as reading ``ids``, its prefix, needs them.

        A replayed measurement does this and no more: what follows it costs the same as in the run that was interrupted.

        Returns:
            The lengths to read up to, one after the other, and how many tokens that costs: those after the longest
            beginning that is held.
        """
        lengths = [len(encode(self._engine.tokenizer, text)) for text in prompt.beginnings[:-1]]
        # A beginning helps only if its tokens are those of the prefix there; what it is cut to decides, not its text.
        cuts = [*sorted({length for length in lengths if length < len(ids)}), len(ids)]
        known = [cut for cut in cuts if tuple(ids[:cut]) in self._states]
        start = known[-1] if known else 0
        if start:
            self._states.move_to_end(tuple(ids[:start]))
        self._states.update({tuple(ids[:cut]): None for cut in cuts if cut > start})
        self._whole.add(tuple(ids))
        while len(self._states) > self._most:
            part = (beginning for beginning in self._states if beginning not in self._whole)
            del self._states[next(part, next(iter(self._states)))]
        return cuts, len(ids) - start

    def after(self, prompt: Prompt, ids: Sequence[int]) -> tuple[MambaState, int]:
        """Return the state after ``ids``, the tokens of the prompt's prefix, and what `charge` says that it costs.

        Places that only a replay holds are read without charge: their reading was counted when it was first done.
        """
        states = {key: state for key, state in self._states.items() if state is not None}  # some may be dropped now
        cuts, cost = self.charge(prompt, ids)
        start = max((cut for cut in cuts if tuple(ids[:cut]) in states), default=0)
        state = states.get(tuple(ids[:start]))
        for cut in (cut for cut in cuts if cut > start):
            state = self._engine.prefill(list(ids[start:cut]), state)
            if tuple(ids[:cut]) in self._states:
                self._states[tuple(ids[:cut])] = state
            start = cut
        assert state is not None
        return state, cost


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A prompt with some questions, in tokens.

    Attributes:
        prefix: the prompt's prefix.
        whole: the whole prompt for each question.
        rest: what of it follows the prefix; None where the tokenizer joins the two.
    """

    prefix: list[int]
    whole: list[list[int]]
    rest: list[list[int] | None]

    @property
    def forks(self) -> bool:
        """Whether every question can go on from the state after the prefix."""
        return bool(self.prefix) and None not in self.rest


class PromptJudge:
    """Scores prompts on the problems of a slice.

    Args:
        model: a `MambaLM`, or a ``peft.PeftModel`` around one.
        tokenizer: its tokenizer.
        problems: the slice.
        loglikelihoods: returns the log-likelihood of each continuation under a model, in nats.
        grade: says whether a completion solves a problem.
        journal: keeps measurements, and gives those of an earlier run back.
        score: what `scores` returns: ``accuracy`` (1 for a right greedy answer, else 0) or ``loglikelihood`` (of the
            worked answer, in nats: cheaper, but a likelier worked answer is not always a right one).
        name: of the slice in the journal.
        batch_size: rows of one pass.
        max_new_tokens: longest completion.
        state_reuse: read a prefix once; off, every prompt is read whole, for comparison.
        budget: most forward tokens; None for no limit.
        state_bytes: of states held.

    Attributes:
        tokens: counts so far, those of replayed measurements included.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        problems: Sequence[MathProblem],
        *,
        loglikelihoods: Loglikelihoods,
        grade: Grade,
        score: str = "accuracy",
        journal: Journal | None = None,
        name: str = "train",
        batch_size: int = 32,
        max_new_tokens: int = 128,
        state_reuse: bool = True,
        budget: int | None = None,
        state_bytes: int = 2**28,
    ) -> None:
        self.model, self.tokenizer, self.problems = model, tokenizer, problems
        self.tokens = Tokens()
        self._loglikelihoods, self._grade = loglikelihoods, grade
        self._journal, self._name, self._by = journal, name, score
        self._max_new_tokens, self._reuse, self._budget = max_new_tokens, state_reuse, budget
        self._engine = Engine(model, tokenizer, batch_size=batch_size)
        self._states = PrefixStates(self._engine, state_bytes)
        self._golds = [tuple(encode(tokenizer, qa_completion(p.solution, p.answer))) for p in problems]
        self._found: dict[tuple[str, Prompt], list[float]] = {}
        self._answered: dict[tuple[Prompt, int], list[Answer]] = {}

    def scores(self, prompt: Prompt, items: int) -> list[float]:
        """Return the score of each of the first ``items`` problems.

        Raises:
            BudgetSpentError: measuring them could cost more than is left.
        """
        return self._scored(self._by, prompt, items)

    def likelihoods(self, prompt: Prompt, items: int) -> list[float]:
        """Return the log-likelihood of each worked answer of the first ``items`` problems, in nats, by any `score`."""
        return self._scored("loglikelihood", prompt, items)

    def _scored(self, by: str, prompt: Prompt, items: int) -> list[float]:
        found = self._found.setdefault((by, prompt), [])
        first = len(found)
        if first < items:
            rest = range(first, items)
            key = f"{self._name} {by} {prompt_key(prompt)} {first}:{items}"
            cut = self._cut(prompt, rest)
            measure = self._score if by == "loglikelihood" else self._solve
            found += self._measured(key, prompt, cut, self._bound(by, cut, rest), lambda: measure(prompt, cut, rest))
        return found[:items]

    def answers(self, prompt: Prompt, items: int) -> list[Answer]:
        """Return greedy completions of the first ``items`` problems, graded; the budget does not bind them."""
        if (prompt, items) not in self._answered:
            key = f"{self._name} answers {prompt_key(prompt)} {items}"
            cut = self._cut(prompt, range(items))
            found = self._measured(key, prompt, cut, 0, lambda: self._answer(prompt, cut, range(items)))
            self._answered[prompt, items] = [Answer(**row) for row in found]
        return self._answered[prompt, items]

    def _cut(self, prompt: Prompt, items: range) -> _Cut:
        texts = [question_of(self.problems[i]) for i in items]
        ids = encode(self.tokenizer, prompt.prefix)
        rest = [query_tokens(prompt, ids, self.tokenizer, text) for text in texts]
        return _Cut(ids, [encode(self.tokenizer, prompt.text(text)) for text in texts], rest)

    def _bound(self, by: str, cut: _Cut, items: range) -> int:
        """Return the most that scores can cost: the prefix, once if it forks, and every question with what follows."""
        queries = sum(map(len, cut.whole))
        shared = (len(items) - 1) * len(cut.prefix) if self._reuse and cut.forks else 0
        after = [len(self._golds[i]) if by == "loglikelihood" else self._max_new_tokens for i in items]
        return queries - shared + sum(after)

    def _measured(
        self, key: str, prompt: Prompt, cut: _Cut, bound: int, measure: Callable[[], tuple[list[Any], Tokens]]
    ) -> list[Any]:
        if self._budget is not None and bound and self.tokens.forward + bound > self._budget:
            raise BudgetSpentError
        entry = self._journal.find(key) if self._journal else None
        if entry is not None:
            if self._reuse and cut.forks:
                self._states.charge(prompt, cut.prefix)
            self.tokens.add(Tokens(**entry["tokens"]))
            return list(entry["values"])
        values, tokens = measure()
        self.tokens.add(tokens)
        if self._journal:
            self._journal.add(key, {"values": values, "tokens": dataclasses.asdict(tokens), "prompt": prompt.as_dict()})
        return values

    def _prepared(self, prompt: Prompt, cut: _Cut) -> tuple[nn.Module, list[list[int]], Tokens]:
        """Return the model as it stands before the queries, the tokens of each query, and what that has read."""
        tokens = Tokens(naive=sum(map(len, cut.whole)), unaligned=sum(part is None for part in cut.rest))
        if not self._reuse or not cut.forks:
            tokens.read = tokens.naive
            return self.model, cut.whole, tokens
        state, cost = self._states.after(prompt, cut.prefix)
        queries = [part for part in cut.rest if part is not None]
        tokens.read = cost + sum(map(len, queries))
        return PrimedModel(self.model, state), queries, tokens

    def _score(self, prompt: Prompt, cut: _Cut, items: range) -> tuple[list[float], Tokens]:
        model, queries, tokens = self._prepared(prompt, cut)
        pairs = [(tuple(query), self._golds[i]) for query, i in zip(queries, items, strict=True)]
        gold = sum(len(self._golds[i]) - 1 for i in items)  # the last token is scored, not read
        tokens.read += gold
        tokens.naive += gold
        return list(self._loglikelihoods(model, pairs)), tokens

    def _solve(self, prompt: Prompt, cut: _Cut, items: range) -> tuple[list[float], Tokens]:
        answers, tokens = self._answer(prompt, cut, items)
        return [float(answer["correct"]) for answer in answers], tokens

    def _answer(self, prompt: Prompt, cut: _Cut, items: range) -> tuple[list[dict[str, Any]], Tokens]:
        model, queries, tokens = self._prepared(prompt, cut)
        engine = Engine(model, self.tokenizer, batch_size=self._engine.batch_size)
        params = SamplingParams(max_new_tokens=self._max_new_tokens, stop=prompt.stops)
        completions = [found[0] for found in engine.generate(queries, params)]
        tokens.generated = sum(len(completion.token_ids) for completion in completions)
        tokens.naive += tokens.generated
        answers = [
            Answer(
                self.problems[i].id, completion.text, self._grade(self.problems[i], completion.text),
                len(completion.token_ids),
            )
            for i, completion in zip(items, completions, strict=True)
        ]  # fmt: skip
        return [dataclasses.asdict(answer) for answer in answers], tokens
