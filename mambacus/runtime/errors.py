"""The one exception type for faults that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A fault the user can mend.

    The command line prints it as one line and exits with status 2, without a traceback. The message names the thing,
    what was expected and what was got.
    """


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for near misses of ``wrong`` among ``known``, else an empty string."""
    near = difflib.get_close_matches(wrong, list(dict.fromkeys(known)), n=2)
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
