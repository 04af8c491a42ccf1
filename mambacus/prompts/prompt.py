"""A prompt: an instruction, worked examples and the frame a question is put in; as YAML and as text.

The text falls in two, at either of two places. The *preamble* ends where a whole question in its frame begins: a state
file stands there, so that whoever goes on from it asks as if from the start. The *prefix* is the longest text that is
the same for every question, the frame's first words included: a search shares it. White space at the end of the prefix
belongs to the *query*, because byte-pair tokenizers start a new token there. That the tokens of both parts apart are
those of the whole text is checked where a border is used: `compile_tokens`, `query_tokens`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mambacus.data.problems import MathProblem
from mambacus.data.prompts import qa_completion, qa_prompt
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.records import write_bytes_atomic
from mambacus.runtime.yaml_files import read_mapping

SLOT = "{question}"
STOPS = ("\nQuestion:", "\n\nQuestion")  # those of `solve`: a model that starts a question of its own has finished


@dataclasses.dataclass(frozen=True)
class Exemplar:
    """One worked example.

    Attributes:
        question: its question.
        completion: what follows the frame: a space, the worked solution and the line ``#### <answer>``.
        id: of the problem it was made from, or empty.
    """

    question: str
    completion: str
    id: str = ""

    @classmethod
    def of(cls, problem: MathProblem) -> Exemplar:
        """Return the example that shows how ``problem`` is solved."""
        return cls(question_of(problem), qa_completion(problem.solution, problem.answer), problem.id)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What stands around a question.

    Attributes:
        question: the frame of a question, with ``{question}`` once; the completion follows it.
        instruction: text at the very beginning, or empty.
        separator: between instruction, examples and the question.
        exemplars: worked examples in order.
    """

    question: str = qa_prompt(SLOT)
    instruction: str = ""
    separator: str = "\n\n"
    exemplars: tuple[Exemplar, ...] = ()

    def __post_init__(self) -> None:
        if self.question.count(SLOT) != 1:
            raise UserError(f"prompt: question: expected {SLOT} once, got {self.question!r}")

    @functools.cached_property
    def _parts(self) -> tuple[str, str, str]:
        """Prefix, the white space and text between it and a question, and the text after the question."""
        before, after = self.question.split(SLOT)
        fixed = self.preamble + before
        prefix = fixed.rstrip()
        return prefix, fixed[len(prefix) :], after

    @property
    def preamble(self) -> str:
        """The text before a whole question, up to the separator after the last example; empty if there is none."""
        blocks = self._blocks
        return self.separator.join([*blocks, ""]) if blocks else ""

    def framed(self, question: str) -> str:
        """Return what follows the preamble when ``question`` is asked: the question in its frame."""
        return self.question.replace(SLOT, question.strip())

    @property
    def lead(self) -> str:
        """The words before the question in its frame, without white space at their end; perhaps none."""
        return self.question.split(SLOT)[0].rstrip()

    @functools.cached_property
    def _blocks(self) -> list[str]:
        """The instruction, if there is one, and the worked examples in their frames."""
        before, after = self.question.split(SLOT)
        shown = [f"{before}{example.question}{after}{example.completion}" for example in self.exemplars]
        return [*([self.instruction] if self.instruction else []), *shown]

    @property
    def prefix(self) -> str:
        """The text before every question, without white space at its end; empty if there is none."""
        return self._parts[0]

    def query(self, question: str) -> str:
        """Return what follows the prefix when ``question`` is asked."""
        _, gap, after = self._parts
        return f"{gap}{question.strip()}{after}"

    def text(self, question: str) -> str:
        """Return the whole prompt for ``question``."""
        return self.prefix + self.query(question)

    @property
    def beginnings(self) -> list[str]:
        """The prefix up to the end of the instruction and of every worked example, shortest first; the last is whole.

        Prompts with the same instruction and first examples share the first of them, and so may share states.
        """
        blocks = self._blocks
        cut = [self.separator.join(blocks[: number + 1]).rstrip() for number in range(len(blocks))]
        return [text for text in dict.fromkeys([*cut, self.prefix]) if text]

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a completion: the start of a next question, and a separator with a blank line in it."""
        lead = self.question.split(SLOT)[0].strip()
        own = (f"\n{lead}",) if lead else (self.separator,) if "\n\n" in self.separator else ()
        return tuple(dict.fromkeys((*STOPS, *own)))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as they stand in a prompt file."""
        return {
            "question": self.question,
            "instruction": self.instruction,
            "separator": self.separator,
            "exemplars": [dataclasses.asdict(example) for example in self.exemplars],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "prompt") -> Prompt:
        """Return the prompt that `as_dict` described; what is absent has its default.

        Raises:
            UserError: an unknown key or a value of another type, naming ``where``.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise UserError(f"{where}: unknown key {key!r}{suggest(str(key), known)}")
            kind = list if key == "exemplars" else str
            if not isinstance(value, kind):
                raise UserError(f"{where}: {key}: expected a {kind.__name__}, got {value!r}")
        rows = values.get("exemplars", [])
        exemplars = tuple(_exemplar(row, f"{where}: exemplar {number}") for number, row in enumerate(rows, start=1))
        return cls(**{**values, "exemplars": exemplars})


DEFAULT = Prompt()  # what `solve` asks without a prompt file, and what fine-tuning trains on


def question_of(problem: MathProblem) -> str:
    """Return what stands for ``{question}``: the question, with its choices on a line of their own if it has any."""
    return unframed(qa_prompt(problem.question, problem.options))


def unframed(text: str) -> str:
    """Return the question in a text of `qa_prompt`."""
    before, after = qa_prompt(SLOT).split(SLOT)
    return text.removeprefix(before).removesuffix(after)


def _exemplar(row: Any, where: str) -> Exemplar:
    if not isinstance(row, dict) or not {"question", "completion"} <= set(row) <= {"question", "completion", "id"}:
        raise UserError(f"{where}: expected question and completion (and perhaps id), got {row!r}"[:300])
    for key, value in row.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {key}: expected a text, got {value!r}")
    return Exemplar(**row)


def read_prompt(path: Path, flag: str = "--prompt") -> Prompt:
    """Read a prompt file.

    Raises:
        UserError: no such file, not YAML, an unknown key, or a value of another type.
    """
    return Prompt.from_dict(read_mapping(path, flag), f"{flag} {path}")


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, with line ends as escapes: their number decides what a tokenizer makes of them."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _quoted)


def write_prompt(path: Path, prompt: Prompt, comment: str = "") -> None:
    """Write a prompt file, atomically; ``comment`` stands at its head.

    Raises:
        UserError: it cannot be written.
    """
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    body = yaml.dump(prompt.as_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100_000)
    write_bytes_atomic(path, (head + body).encode())


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, without special ones."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def query_tokens(prompt: Prompt, prefix_ids: Sequence[int], tokenizer: Any, question: str) -> list[int] | None:
    """Return the tokens of the whole prompt for ``question`` after those of the prefix.

    Returns:
        None if the whole text does not begin with the tokens of the prefix: the tokenizer joins its end with the rest.
    """
    whole = encode(tokenizer, prompt.text(question))
    border = len(prefix_ids)
    return whole[border:] if whole[:border] == list(prefix_ids) and len(whole) > border else None


def compile_tokens(prompt: Prompt, tokenizer: Any, questions: Sequence[str]) -> list[int]:
    """Return the tokens of the preamble; none if no text stands before the first question.

    Args:
        prompt: what is compiled.
        tokenizer: the model's.
        questions: at least one; the border is tried on them.

    Raises:
        UserError: the tokenizer joins the end of the preamble with a question, so that no state stands there.
    """
    whole, framed = encode(tokenizer, prompt.text(questions[0])), encode(tokenizer, prompt.framed(questions[0]))
    ids = whole[
        : max(0, len(whole) - len(framed))
    ]  # not those of the preamble alone: its end may be cut otherwise there
    for question in questions:
        check_border(prompt, ids, tokenizer, question)
    return ids


def check_border(prompt: Prompt, preamble_ids: Sequence[int], tokenizer: Any, question: str) -> None:
    """Make sure that the framed question, cut into tokens by itself, is what follows the preamble in the whole prompt.

    Raises:
        UserError: it is not.
    """
    if encode(tokenizer, prompt.text(question)) != [*preamble_ids, *encode(tokenizer, prompt.framed(question))]:
        raise UserError(
            f"prompt: the tokenizer joins the end of the fixed part ({prompt.preamble[-20:]!r}) with the question "
            f"({prompt.framed(question)[:20]!r}), or the state was read from other tokens; end the separator "
            f"({prompt.separator!r}) in a line end"
        )
