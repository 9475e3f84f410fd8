"""Decoding every picture once, before training, so that a damaged file is a line in a report and not a crash in the third epoch.

The alternative, to skip or replace what fails while training, changes the data without a word and moves the validation score. Decoding in
threads costs little: Pillow releases the interpreter while it decodes. The digest taken on the way shows copies of a picture.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from veneer.errors import DataError

from .pictures import UnreadableImage
from .sources import Found, Pictures, Skipped

CHUNK = 16  # pictures per task: few enough for smooth progress, enough that a million pictures are not a million tasks
PATIENCE = 2.0  # seconds before progress is shown

T = TypeVar("T")


def readable(found: Found, rows: Sequence[int]) -> tuple[dict[int, bytes], list[Skipped]]:
    """The rows whose pictures can be decoded, each with a digest of its content, and the others with the reason.

    A file that is listed twice under the same class and part counts once; it is skipped the second time.

    Args:
        found: the source's lists.
        rows: those to read.

    Raises:
        DataError: one file is listed under two classes or in two parts.

    >>> from veneer.vision.sources import Files
    >>> readable(Found("here", "", Files(["/nowhere.jpg"]), ["cat"], [""], ["cat"]), [0])
    ({}, [Skipped(source='/nowhere.jpg', reason='no such file')])
    """
    digests: dict[int, bytes] = {}
    skipped: list[Skipped] = []
    for row, outcome in zip(rows, check(found.pictures, rows), strict=True):
        if isinstance(outcome, bytes):
            digests[row] = outcome
        else:
            skipped.append(Skipped(outcome.source, outcome.reason))
    return _each_once(found, digests, skipped), skipped


def check(pictures: Pictures, rows: Sequence[int], *, patience: float = PATIENCE) -> list[bytes | UnreadableImage]:
    """Decode pictures in threads: a digest for each, or what is wrong with it.

    Args:
        pictures: where the rows are read from.
        rows: those to read.
        patience: seconds after which a terminal shows progress.

    >>> from veneer.vision.sources import Files
    >>> check(Files(["/nowhere.jpg"]), [0])[0].reason
    'no such file'
    """

    def outcomes(chunk: Sequence[int]) -> list[bytes | UnreadableImage]:
        return [_outcome(pictures, row) for row in chunk]

    chunks = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    pool = ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)))
    with warnings.catch_warnings():
        # A picture is readable or not; what its metadata looks like is nobody's concern here.
        warnings.simplefilter("ignore")
        try:
            found = _with_progress(pool.map(outcomes, chunks), len(rows), patience)
            return list(chain.from_iterable(found))
        finally:
            pool.shutdown(cancel_futures=True)


def _outcome(pictures: Pictures, row: int) -> bytes | UnreadableImage:
    try:
        return pictures.fingerprint(row)
    except UnreadableImage as error:
        # Its traceback would keep the picture's memory.
        return UnreadableImage(error.source, error.reason)


def _with_progress(chunks: Iterator[list[T]], total: int, patience: float) -> Iterator[list[T]]:
    started = time.monotonic()
    done = 0
    for chunk in chunks:
        done += len(chunk)
        yield chunk
        if time.monotonic() - started >= patience and sys.stderr.isatty():
            break
    else:
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Checking pictures", total=total, completed=done)
        for chunk in chunks:
            progress.advance(task, len(chunk))
            yield chunk


def _each_once(found: Found, digests: dict[int, bytes], skipped: list[Skipped]) -> dict[int, bytes]:
    """Drop what is listed twice. Only equal content is asked for its file, so that a large folder costs no path lookups."""
    alike: dict[bytes, list[int]] = {}
    for row, content in digests.items():
        alike.setdefault(content, []).append(row)
    again: set[int] = set()
    for rows in alike.values():
        first: dict[str, int] = {}
        for row in rows if len(rows) > 1 else []:
            file = found.pictures.file(row)
            if file is not None and (before := first.setdefault(file, row)) != row:
                _refuse_contradiction(found, before, row, file)
                again.add(row)
                skipped.append(Skipped(found.pictures.source(row), f"listed twice: the same file as {found.pictures.source(before)}"))
    return {row: content for row, content in digests.items() if row not in again}


def _refuse_contradiction(found: Found, one: int, other: int, file: str) -> None:
    classes, parts = (found.classes[one], found.classes[other]), (found.parts[one], found.parts[other])
    if classes[0] != classes[1]:
        raise DataError(
            f'{found.name} lists {file} under two classes, "{classes[0]}" and "{classes[1]}". A picture has one class here: keep one of them.'
        )
    if parts[0] != parts[1]:
        raise DataError(
            f"{found.name} lists {file} in {parts[0]} and in {parts[1]}, which would make the score too good. Keep one of them."
        )
