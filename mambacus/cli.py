"""The command line: a table of verbs, each a module of this package loaded only when called."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from mambacus import __version__
from mambacus.runtime.errors import UserError, suggest

VERBS = {
    "demo": "the study on the embedded model: CPU, minutes, no network",
    "study": "run a recipe: baseline, finetune, merge, evaluate, solve, report",
    "finetune": "fine-tune a model on question-answer data",
    "merge": "fold an adapter into its model, refused unless the logits agree",
    "evaluate": "score a model on lm-evaluation-harness tasks",
    "solve": "let a model solve math problems and grade the answers",
    "generate": "continue prompts: one, a file of many, a very long one, a saved state",
    "chat": "talk with a tuned model; the conversation is a state",
    "serve": "an OpenAI-compatible HTTP server",
    "prompt": "search a prompt, compile it into a state, tune the state",
    "bench": "measure speed and memory side by side with peers",
    "report": "draw records as one HTML page with tables and plots",
    "convert": "write a model in the Hugging Face or the original format",
    "info": "describe a model: parameters, bytes, state, kernels",
    "pretrain": "train a small model from scratch on text",
    "controlled": "Mamba against a Transformer of equal size on synthetic tasks",
}


def usage() -> str:
    """Return the text of ``mambacus --help``."""
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        f"mambacus {__version__}: fine-tune, merge, evaluate, run and measure Mamba language models\n\n"
        f"usage: mambacus VERB [flags]      mambacus VERB --help for the flags of one verb\n\n{lines}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        The exit status: 0 fine, 2 the user's fault in one line, 130 interrupted, 141 the reader of our output is gone.
    """
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # the process is ours
        signal.signal(signal.SIGINT, _interrupt)
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        status = _dispatch(argv)
        sys.stdout.flush()  # here a closed pipe can still be caught
    except KeyboardInterrupt:
        print(f"mambacus {' '.join(argv[:1])}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # ``mambacus info tiny | head -1``: not a fault, and nobody reads what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _interrupt(_signal: int, frame: FrameType | None) -> None:
    """Turn Ctrl-C into KeyboardInterrupt, but leave at once during an import, which torch and numpy do not survive."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(sys.stderr.fileno(), b"mambacus: interrupted\n")
            os._exit(128 + signal.SIGINT)
        frame = frame.f_back
    raise KeyboardInterrupt


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"mambacus {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        print(f"mambacus: unknown verb {verb!r}{suggest(verb, VERBS)} (see mambacus --help)", file=sys.stderr)
        return 2
    try:
        importlib.import_module(f"mambacus.{verb}").main(rest)
    except UserError as error:
        if os.environ.get("MAMBACUS_DEBUG"):
            raise
        return _refuse(verb, str(error))
    except OSError as error:
        # A path of the user's that no check foresaw: no permission, too long a name, a disk that went away.
        if error.filename is None or isinstance(error, BrokenPipeError) or os.environ.get("MAMBACUS_DEBUG"):
            raise
        return _refuse(verb, f"{error.filename}: {error.strerror} (--debug shows where)")
    return 0


def _refuse(verb: str, message: str) -> int:
    print(f"mambacus {verb}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
