"""Further instructions from a language model behind an OpenAI-compatible endpoint; used only where one is named."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence

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
