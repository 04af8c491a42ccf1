"""``mambacus chat``: talk with a model through its chat template, a line a turn; the conversation is a state."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mambacus.runtime.config import opt, parse
from mambacus.runtime.errors import UserError, suggest
from mambacus.runtime.flags import weights_flag
from mambacus.runtime.outputs import claim_file
from mambacus.runtime.records import Record, Stopwatch, write_record
from mambacus.runtime.sampling import SamplingFlags

if TYPE_CHECKING:
    from mambacus.inference.conversation import Conversation

COMMANDS = {
    "/save FILE": "write the conversation as a state file",
    "/load FILE": "go on with a saved one, or begin from another state",
    "/reset": "go back to the beginning",
    "/stats": "what the last answer cost",
    "/help": "this list",
    "/quit": "end (or Ctrl-D); Ctrl-C ends an answer",
}


@dataclasses.dataclass(frozen=True)
class Config(SamplingFlags):
    """Whom to talk with, and how."""

    model: str = opt("tiny", help="a tuned model: a folder, a hub id, tiny or random:SIZE")
    adapter: str | None = opt(None, help="PEFT adapter folder to attach", metavar="DIR")
    chat_template: Path | None = opt(None, help="Jinja template instead of the tokenizer's own", metavar="FILE.jinja")
    system: str | None = opt(None, help="message that the conversation begins with", metavar="TEXT")
    max_new_tokens: int = opt(512, help="length limit of an answer in tokens", least=1)
    state: Path | None = opt(None, help="saved conversation to go on with, or state to begin from", metavar="FILE")
    save_state: Path | None = opt(None, help="save the conversation here at its end", metavar="FILE")
    device: str = opt("auto", help="auto, cpu, cuda or cuda:N")
    dtype: str = opt("float32", help="dtype of the weights", choices=("float32", "bfloat16", "float16"))
    weights: str | None = weights_flag()
    tokenizer: str | None = opt(None, help="tokenizer folder or file instead of the model's", metavar="PATH")
    data_dir: Path | None = opt(None, help="data folder with tokenizer/20B_tokenizer.json", metavar="DIR")
    out: Path | None = opt(None, help="write the record here", metavar="FILE.json")
    overwrite: bool = opt(False, help="replace existing files, also by /save")


def run(config: Config, lines: Iterator[str], tell: Callable[[str], object], *, forgive: bool = False) -> Record:
    """Hold a conversation.

    ``results``: ``messages``, ``turns`` (tokens read, read again and generated, reason of the end) and the figures of
    the engine.

    Args:
        config: the flags.
        lines: questions and commands.
        tell: called with the answers, piece by piece.
        forgive: after a fault print it and go on, as a person at a terminal wants.

    Raises:
        UserError: no such model, adapter, state or template, a state of another model, a file that exists; and what
            a line asks for and cannot have, unless ``forgive``.
    """
    watch = Stopwatch()
    for flag, path in (("--out", config.out), ("--save-state", config.save_state)):
        if path is not None:
            claim_file(path, overwrite=config.overwrite, flag=flag)
    conversation = _conversation(config)
    for line in lines:
        if line.strip() == "/quit":
            break
        if not line.strip():
            continue
        try:
            _answer(config, conversation, line, tell)
        except UserError as error:
            if not forgive:
                raise
            print(f"error: {error}", file=sys.stderr)
    if config.save_state:
        conversation.save(config.save_state)
    stats = conversation.engine.stats
    results = {
        "messages": conversation.messages,
        "turns": [dataclasses.asdict(turn) for turn in conversation.turns],
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "tokens_per_second": stats.tokens_per_second,
    }
    record = watch.record("chat", config.model, config, results)
    if config.out:
        write_record(config.out, record)
    return record


def _conversation(config: Config) -> Conversation:
    from mambacus.inference import Engine
    from mambacus.inference.chat_template import NO_TEMPLATE, load_template
    from mambacus.inference.conversation import Conversation
    from mambacus.models import load
    from mambacus.runtime.device import resolve_device, resolve_dtype

    model, tokenizer = load(
        config.model, resolve_device(config.device), resolve_dtype(config.dtype), config.adapter,
        weights=config.weights, tokenizer=config.tokenizer, data_dir=config.data_dir,
    )  # fmt: skip
    if tokenizer is None:
        raise UserError(f"--model {config.model}: it has no tokenizer")
    template = load_template(tokenizer, config.chat_template)
    if not template.possible:
        raise UserError(f"--model {config.model}: {NO_TEMPLATE}")
    conversation = Conversation(Engine(model, tokenizer, batch_size=1), template, config.system)
    if config.state:
        conversation.load(config.state, "--state")
        if config.system is not None and {"role": "system", "content": config.system} not in conversation.messages[:1]:
            raise UserError(f"--system: {config.state} holds a conversation that did not begin so; leave --system out")
    return conversation


def _answer(config: Config, conversation: Conversation, line: str, tell: Callable[[str], object]) -> None:
    """Do what one line asks for."""
    if line.startswith("/"):
        _command(config, conversation, line)
        return
    from mambacus.inference import SamplingParams

    options = config.options()
    options["seed"] += len(conversation.turns)  # the same words, asked twice, may be answered otherwise
    params = SamplingParams(**options)
    with _ctrl_c(conversation.stop):
        for piece in conversation.ask(line, params):
            tell(piece)
    tell("\n")


def _command(config: Config, conversation: Conversation, line: str) -> None:
    word, _, rest = line.strip().partition(" ")
    if word in ("/save", "/load"):
        if not rest.strip():
            raise UserError(f"{word}: expected a file name")
        path = Path(rest.strip()).expanduser()
        if word == "/load":
            conversation.load(path, word)
        else:
            claim_file(path, overwrite=config.overwrite, flag=word)
            conversation.save(path)
    elif word == "/reset":
        conversation.reset()
    elif word == "/stats":
        print(_stats(conversation), file=sys.stderr)
    elif word == "/help":
        print("\n".join(f"{name:<11} {text}" for name, text in COMMANDS.items()), file=sys.stderr)
    else:
        known = [name.split()[0] for name in COMMANDS]
        hint = suggest(word, known) or f"; known: {', '.join(known)}"
        raise UserError(f"unknown command {word!r}{hint} (a question that begins with / needs a space before it)")


def _stats(conversation: Conversation) -> str:
    whole = f"conversation: {conversation.tokens} tokens read, state of {conversation.nbytes / 1e6:.2f} MB"
    if not conversation.turns:
        return whole
    turn = conversation.turns[-1]
    return (
        f"last turn: {turn.read} tokens read ({turn.again} of them again), {turn.generated} generated "
        f"({turn.finish_reason}); {whole}"
    )


@contextlib.contextmanager
def _ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call ``stop`` for a while."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """Yield what a person types; Ctrl-C takes the line back, Ctrl-D ends."""
    import readline  # noqa: F401 -- gives input() a history and keys to edit with

    print(f"{'  '.join(name for name in COMMANDS)}", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)", file=sys.stderr)
        except UnicodeDecodeError:
            print("error: expected UTF-8 text, got other bytes", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return


def _piped() -> Iterator[str]:
    """Yield the lines of standard input."""
    try:
        for line in sys.stdin:
            yield line.removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError("standard input: expected UTF-8 text, got other bytes") from None


def main(argv: Sequence[str]) -> None:
    """Run the verb: answers on standard output, everything else on standard error."""
    config = parse(Config, argv, "mambacus chat", __doc__ or "")
    person = sys.stdin.isatty()
    run(config, _typed() if person else _piped(), _tell, forgive=person)


def _tell(text: str) -> None:
    print(text, end="", flush=True)
