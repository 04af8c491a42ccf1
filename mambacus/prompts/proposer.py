"""Further instructions from a language model behind an OpenAI-compatible endpoint; used only where one is named."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from mambacus.prompts.journal import Journal
from mambacus.prompts.prompt import Prompt
from mambacus.prompts.search import Standing
from mambacus.runtime.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
SHOWN = 6  # leaders that the model is shown
LONGEST = 400  # characters of an instruction
SECONDS = 60.0

_REQUEST = (
    "You improve the instruction at the head of a prompt for a small language model that solves grade-school word "
    "problems. Below are instructions tried so far with their scores (higher is better). Write {count} new "
    "instructions that could score higher. Answer with a JSON list of {count} strings and nothing else.\n\n{tried}"
)


@dataclasses.dataclass(frozen=True)
class Proposer:
    """Asks a model for instructions and puts them at the head of the leading prompt.

    Attributes:
        url: of the API, such as ``http://localhost:8000/v1``; over HTTP or HTTPS.
        model: its name there.
        count: instructions asked for in each round.
    """

    url: str
    model: str
    count: int = 4

    def __call__(self, standings: Sequence[Standing]) -> list[Prompt]:
        """Return the leading prompt with each new instruction.

        Raises:
            UserError: the endpoint cannot be reached or answers with something else.
        """
        tried = "\n".join(f"{s.mean:.3f}  {json.dumps(s.prompt.instruction)}" for s in standings[:SHOWN])
        content = self._ask(_REQUEST.format(count=self.count, tried=tried))
        best = standings[0].prompt
        return [dataclasses.replace(best, instruction=text) for text in self._instructions(content)]

    def _ask(self, text: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 1.0}
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            raise UserError(f"--proposer {address}: answered {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"--proposer {address}: cannot be reached ({error})") from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(f"--proposer {address}: its answer is not a chat completion") from None

    def _instructions(self, content: str) -> list[str]:
        """Return the instructions in an answer; text around the list, such as a code fence, is passed over."""
        try:
            values = json.loads(content[content.index("[") : content.rindex("]") + 1])
        except ValueError:
            raise UserError(
                f"--proposer {self.url}: expected a JSON list of instructions, got {content[:80]!r}"
            ) from None
        good = [value.strip() for value in values if isinstance(value, str) and 0 < len(value.strip()) <= LONGEST]
        return list(dict.fromkeys(good))[: self.count]


class KeptProposals:
    """Proposals that a journal keeps, so that a resumed search is given those of its first run.

    Where the endpoint fails, the round goes on without proposals, and a line on standard error says so.

    Args:
        proposer: asked once a round.
        journal: of the search.
    """

    def __init__(self, proposer: Callable[[Sequence[Standing]], list[Prompt]], journal: Journal) -> None:
        self._propose, self._journal = proposer, journal
        self._asked = 0

    def __call__(self, standings: Sequence[Standing]) -> list[Prompt]:
        """Return the proposals of the next round."""
        self._asked += 1
        key = f"proposals {self._asked}"
        entry = self._journal.find(key)
        if entry is not None:
            return [Prompt.from_dict(values, f"{self._journal.path}: {key}") for values in entry["prompts"]]
        try:
            proposed = self._propose(standings)
        except UserError as error:
            print(f"mambacus prompt optimise: warning: {error}; this round has no proposals", file=sys.stderr)
            proposed = []
        self._journal.add(key, {"prompts": [prompt.as_dict() for prompt in proposed]})
        return proposed
