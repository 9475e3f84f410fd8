"""What a source was found to hold, before anything is opened: the same few lists for folders, tables and data sets.

A source only lists; whether pictures can be read, classes are complete and splits make sense is decided once, for all of them, in `data`.
Pictures stay where they are: a list of paths, or a reference to a memory-mapped data set, so that a worker process receives little.
"""

from __future__ import annotations

import io
import math
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from veneer.errors import DataError, suggest

from ..pictures import UnreadableImage, digest, fingerprint, open_bytes, open_image


@dataclass(frozen=True)
class Skipped:
    """A file or row that was left out, and why."""

    source: str
    reason: str


class Pictures(Protocol):
    """Pictures by row; what a split reads from."""

    def __len__(self) -> int: ...

    def image(self, row: int) -> Image.Image:
        """The picture, upright RGB; `UnreadableImage` where there is none."""
        ...

    def source(self, row: int) -> str:
        """Where it comes from: a path, or a row's number."""
        ...

    def fingerprint(self, row: int) -> bytes:
        """Decode it completely and return a digest of its content; `UnreadableImage` as for `image`."""
        ...

    def file(self, row: int) -> str | None:
        """The file behind it with every link resolved, if there is one."""
        ...


@dataclass(frozen=True, eq=False)
class Files:
    """Pictures that are files of their own. `notes` say where a path was listed, for reports."""

    paths: list[str]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, row: int) -> Image.Image:
        return open_image(self.paths[row])

    def source(self, row: int) -> str:
        return self.paths[row]

    def fingerprint(self, row: int) -> bytes:
        try:
            return fingerprint(Path(self.paths[row]))
        except UnreadableImage as error:
            where = f" ({self.notes[row]})" if self.notes else ""
            raise UnreadableImage(error.source, error.reason + where) from error

    def file(self, row: int) -> str | None:
        return os.path.realpath(self.paths[row])


@dataclass(frozen=True, eq=False)
class Rows:
    """Pictures in a column of a `datasets.Dataset` that is not decoded: bytes, a path, or both in a dictionary."""

    dataset: Any
    column: str
    base: str
    name: str = ""

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, row: int) -> Image.Image:
        value = self._value(row)
        return open_bytes(value, self.source(row)) if isinstance(value, bytes) else open_image(value)

    def source(self, row: int) -> str:
        return f"{self.name} row {row}".strip()

    def fingerprint(self, row: int) -> bytes:
        value = self._value(row)
        if isinstance(value, bytes):
            open_bytes(value, self.source(row))
            return digest(io.BytesIO(value))
        try:
            return fingerprint(value)
        except UnreadableImage as error:
            raise UnreadableImage(self.source(row), f"{error.reason}: {value}") from error

    def file(self, row: int) -> str | None:
        value = self._value(row)
        return None if isinstance(value, bytes) else os.path.realpath(value)

    def _value(self, row: int) -> bytes | Path:
        value = self.dataset[row][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str) and value:
            return local_path(value, Path(self.base))
        raise UnreadableImage(self.source(row), "no picture in this row")


@dataclass(frozen=True, eq=False)
class Several:
    """The pictures of several parts, one after the other."""

    members: list[Pictures]

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def image(self, row: int) -> Image.Image:
        member, row = self._at(row)
        return member.image(row)

    def source(self, row: int) -> str:
        member, row = self._at(row)
        return member.source(row)

    def fingerprint(self, row: int) -> bytes:
        member, row = self._at(row)
        return member.fingerprint(row)

    def file(self, row: int) -> str | None:
        member, row = self._at(row)
        return member.file(row)

    def _at(self, row: int) -> tuple[Pictures, int]:
        for member in self.members:
            if row < len(member):
                return member, row
            row -= len(member)
        raise IndexError(row)


@dataclass(frozen=True, eq=False)
class Found:
    """A source's content as listed, nothing opened yet.

    Args:
        name: the source, for messages.
        by: what gave the parts, such as "the folders"; part of a sentence.
        pictures: every picture listed.
        classes: each picture's class name, `""` where it has none.
        parts: each picture's part, `""` where the source has no parts.
        declared: classes that must have pictures.
        order: the source's own order of the classes, if it has one.
        skipped: what was left out already.
        notes: what the reader should know.
    """

    name: str
    by: str
    pictures: Pictures
    classes: list[str]
    parts: list[str]
    declared: list[str]
    order: list[str] | None = None
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def class_name(value: Any) -> str:
    """A class's name as text: trimmed, in Unicode's composed form; `""` for no label.

    >>> class_name(" cafe\\u0301 ") == "caf\\u00e9", class_name(3.0), class_name(None)
    (True, '3', '')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value)).strip()


def local_path(value: str, base: Path) -> Path:
    """A path as a table gives it: relative to the table's folder, and with either kind of slash.

    >>> local_path("cat/1.jpg", Path("pets")).as_posix()
    'pets/cat/1.jpg'
    """
    path = base / value
    if "\\" in value and os.sep == "/" and not path.exists():
        return base / value.replace("\\", "/")
    return path


def choose_column(
    wanted: str | None, known: Sequence[str], likely: Sequence[str], *, role: str, source: str, option: str, among: Sequence[str] = ()
) -> str:
    """The column for a role: the one asked for, else the only one that it can be.

    Args:
        wanted: the name the user gave, or None.
        known: the columns there are.
        likely: names that say their role, in small letters.
        role: "the pictures" or "the labels", for messages.
        source: the file or data set, for messages.
        option: the argument that names the column.
        among: columns whose type says their role; considered before `likely`.

    Raises:
        DataError: no such column, none that looks right, or several that do.

    >>> choose_column(None, ["id", "Path"], ["path"], role="the pictures", source="a.csv", option="image_column")
    'Path'
    """
    listed = f"Its columns are: {', '.join(known) or 'none'}."
    if wanted is not None:
        if wanted in known:
            return wanted
        raise DataError(f'{source} has no column "{wanted}" for {role}.{suggest(wanted, known)} {listed}')
    named = [name for name in known if name.strip().lower() in likely]
    candidates = list(among)
    if len(candidates) != 1:
        candidates = [name for name in candidates if name in named] or candidates or named
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise DataError(f"{source} has several columns that could hold {role}: {', '.join(candidates)}. Choose one with {option}.")
    raise DataError(
        f"{source} has no column that is clearly {role}, such as {' or '.join(likely[:3])}. {listed} Name the right one with {option}."
    )
