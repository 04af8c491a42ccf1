"""All of a run's data in one call: rows, conversion, decontamination, tokens, cache, counts."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mambacus.data.sources import MATH_SPLITS, load_math
from mambacus.models.tokenizer import byte_tokenizer
from mambacus.runtime.errors import UserError, suggest
from mambacus.tuning.data import LeftOut, Sample, encode_stream, iterate_examples
from mambacus.tuning.overlap import OverlapFilter
from mambacus.tuning.schemas import Example
from mambacus.tuning.token_cache import content_key, find, store


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which rows are trained on, and how they become tokens.

    Attributes:
        source: as `iterate_examples` takes it.
        data_dir: folder of the math sets.
        seed: of generated rows.
        convert: as `iterate_examples` takes it.
        max_length: tokens of a sample.
        loss: ``answer`` or ``full``.
        drop_duplicates: leave exact repetitions out.
        against: evaluation sets; rows that share thirteen words in a row with one are left out.
        cache: folder of token files, None to keep the tokens in memory.
    """

    source: str
    data_dir: Path | None = None
    seed: int = 0
    convert: str = "auto"
    max_length: int = 1024
    loss: str = "answer"
    drop_duplicates: bool = False
    against: tuple[str, ...] = ()
    cache: Path | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Samples and what is to be known of them.

    Attributes:
        samples: in the order of their rows.
        lengths: tokens of each.
        counts: for the record.
        content: 16 digits that differ when any token does, or where a sample ends or from where it is trained on.
        highest: largest token id.
        listed: rows that were left out, repeated or cut: ``{row, reason, text}``.
    """

    samples: Sequence[Sample]
    lengths: list[int]
    counts: dict[str, Any]
    content: str
    highest: int
    listed: list[dict[str, str]]


def prepare(settings: DataSettings, tokenizer: Any) -> Prepared:
    """Read, convert, filter and tokenise the rows of a source, or find the tokens in the cache.

    Raises:
        UserError: as `iterate_examples` and `encode_stream`; an unknown evaluation set.
    """
    texts = evaluation_texts(settings.against, settings.data_dir)
    overlap = OverlapFilter(texts) if texts else None
    left_out = LeftOut()
    notes: dict[str, Any] = {"counts": {}, "content": "", "highest": 0, "listed": left_out.listed}
    samples: Sequence[Sample]
    encoded = _noted(settings, _examples(settings, tokenizer, left_out), tokenizer, overlap, left_out, notes)
    if settings.cache is None:
        samples = list(encoded)
        lengths = [len(sample) for sample in samples]
    else:
        about = [settings.max_length, settings.loss, settings.drop_duplicates, texts]
        unread = LeftOut()  # the counts that stand beside the tokens are of these rows too
        key = content_key(_examples(settings, tokenizer, unread), tokenizer, about, unread)
        found = find(settings.cache, key)
        stored, notes = found or (store(settings.cache, key, encoded, notes), notes)
        samples, lengths = stored, stored.lengths
    return Prepared(samples, lengths, notes["counts"], notes["content"], notes["highest"], notes["listed"])


def check_source(settings: DataSettings) -> None:
    """Read the first row and the evaluation sets, to refuse early what `prepare` would refuse for them.

    Raises:
        UserError: as `prepare`, if it is for these.
    """
    evaluation_texts(settings.against, settings.data_dir)
    first = dataclasses.replace(settings, source="wordproblems:1") if _is_generated(settings.source) else settings
    next(_examples(first, byte_tokenizer(), LeftOut()))


def _is_generated(source: str) -> bool:
    return re.fullmatch(r"wordproblems:0*[1-9]\d*", source) is not None


def _examples(settings: DataSettings, tokenizer: Any, left_out: LeftOut) -> Iterator[Example]:
    return iterate_examples(
        settings.source, data_dir=settings.data_dir, seed=settings.seed, convert=settings.convert,
        tokenizer=tokenizer, left_out=left_out,
    )  # fmt: skip


def _noted(
    settings: DataSettings,
    examples: Iterator[Example],
    tokenizer: Any,
    overlap: OverlapFilter | None,
    left_out: LeftOut,
    notes: dict[str, Any],
) -> Iterator[Sample]:
    """Yield the samples; once they are through, ``notes`` hold the counts, a hash of all tokens and the largest."""
    content = hashlib.sha256()
    for sample in encode_stream(
        examples, tokenizer, notes["counts"], max_length=settings.max_length, loss=settings.loss,
        drop_duplicates=settings.drop_duplicates, overlap=overlap, left_out=left_out,
    ):  # fmt: skip
        content.update(f"{len(sample)} {sample.trained_from} ".encode())
        content.update(sample.ids.tobytes())
        notes["highest"] = max(notes["highest"], int(sample.ids.max()))
        yield sample
    notes["content"] = content.hexdigest()[:16]


def evaluation_texts(names: Sequence[str], data_dir: Path | None) -> list[tuple[str, str]]:
    """Return ``(set, question)`` of every row of the sets' splits that are not trained on.

    Raises:
        UserError: an unknown set, or its files are not there.
    """
    texts = []
    for name in names:
        splits = [split for split in MATH_SPLITS.get(name, ()) if not split.startswith("train")]
        if not splits:
            known = [known for known, found in MATH_SPLITS.items() if found != ("train",)]
            raise UserError(
                f"--decontaminate-against: expected one of {', '.join(known)}, got {name!r}{suggest(name, known)}"
            )
        for split in splits:
            texts += [(name, problem.question) for problem in load_math(data_dir, name, split)]
    return texts
