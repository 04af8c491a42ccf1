"""The generated word problems by number of steps, in the embedded model's tokens.

``<eos> Question: ... Answer: 12 - 5 = 7 apples ... #### 7 <eos>``; ``x`` is the number of steps (1 to 4).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mambacus.data.prompts import qa_completion, qa_prompt
from mambacus.data.tokenizer import EOS_ID, PAD_ID
from mambacus.data.wordproblems import SPLITS, generate
from mambacus.runtime.config import opt
from mambacus.runtime.errors import UserError
from mambacus.synthetic.tasks import IGNORE, Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Words:
    """Solve a word problem; the answer is the worked solution, ``#### N`` and the end of text, all of it.

    Training and test rows come from the same templates with other numbers, names, nouns and wordings: a model without
    pre-training knows no word that it was not trained on.
    """

    templates: str = opt("train", "templates of `mambacus.data.wordproblems`", choices=SPLITS)
    max_tokens: int = opt(160, "tokens of a row", least=64)
    x_name: ClassVar[str] = "steps"
    least_x: ClassVar[int] = 1
    most_x: ClassVar[int] = 4
    pad: ClassVar[int] = PAD_ID

    @property
    def vocab_size(self) -> int:
        """Tokens of the embedded model's tokenizer."""
        return int(tokenizer().get_vocab_size())

    def length(self, x: int) -> int:
        """Return ``max_tokens``: a problem's words vary more than its steps."""
        return self.max_tokens

    def draw(self, rng: np.random.Generator, rows: int, x: int) -> tuple[Tokens, Tokens]:
        """Return rows and labels as `mambacus.synthetic.tasks.Task.draw`.

        Raises:
            UserError: a problem is longer than ``max_tokens``.
        """
        problems = generate(rows, split=self.templates, seed=int(rng.integers(2**31)), steps=x)
        prompts = tokenizer().encode_batch([qa_prompt(problem.question) for problem in problems])
        answers = tokenizer().encode_batch([qa_completion(problem.solution, problem.answer) for problem in problems])
        ids = np.full((rows, self.max_tokens), PAD_ID, np.int16)
        labels = np.full_like(ids, IGNORE)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            tokens = [EOS_ID, *prompt.ids, *answer.ids, EOS_ID]
            if len(tokens) > self.max_tokens:
                raise UserError(
                    f"wordproblems: max_tokens: expected at least {len(tokens)} for a problem of {x} steps, "
                    f"got {self.max_tokens}"
                )
            first = 1 + len(prompt.ids)
            ids[row, : len(tokens)] = tokens
            labels[row, first : len(tokens)] = tokens[first:]
        return ids, labels


@functools.cache
def tokenizer() -> Tokenizer:
    """Return the embedded model's tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(
        importlib.resources.files("mambacus.data").joinpath("tiny", "tokenizer.json").read_text(encoding="utf-8")
    )
