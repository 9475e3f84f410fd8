"""Finding picture files: folders, patterns, and the order that every machine agrees on.

`Path.rglob` neither follows linked folders safely nor gives an order; and sorting by string puts "10" before "2". Here folders are walked
once each, whichever links lead to them, and names are sorted as a person would.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from veneer.errors import DataError, suggest

SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2",
        ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".qoi", ".pcx",
    )
)  # fmt: skip
LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx"))
FolderId = tuple[int, int]
NaturalKey = tuple[tuple[tuple[int, str], ...], str]


def natural_key(name: str) -> NaturalKey:
    """Sort key under which "2" comes before "10" and case decides last.

    >>> sorted(["10", "Zebra", "2", "apple", "Apple"], key=natural_key)
    ['2', '10', 'Apple', 'apple', 'Zebra']
    """
    pieces = re.split(r"([0-9]+)", name)  # text, digits, text, ...: compared kind by kind
    key = [(0, piece.casefold()) if i % 2 == 0 else (len(piece.lstrip("0")), piece.lstrip("0")) for i, piece in enumerate(pieces)]
    return tuple(key), name


def is_litter(name: str) -> bool:
    """Whether a file or folder is one that computers leave behind: hidden, or a thumbnail index.

    >>> is_litter(".DS_Store"), is_litter("Thumbs.db"), is_litter("cat.jpg")
    (True, True, False)
    """
    return name.startswith(".") or name.lower() in LITTER


def folder_id(path: str | Path) -> FolderId:
    """What two paths have in common when they lead to the same folder."""
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """A folder's entries in natural order, without the litter.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not is_litter(entry.name)), key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise DataError(f"Cannot read the folder {folder}: {error.strerror}. Allow reading it, or leave it out.") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def walk(folder: str | Path, seen: set[FolderId] | None = None) -> Iterator[Path]:
    """Every file under a folder, in natural order, its own files before those of sub-folders.

    Args:
        folder: where to start.
        seen: folders not to enter again; those entered are added, so that links in a circle end.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("10.png", "2.png", ".hidden"):
    ...         Path(folder, name).touch()
    ...     [path.name for path in walk(folder)]
    ['2.png', '10.png']
    """
    seen = set() if seen is None else seen
    here = folder_id(folder)
    if here in seen:
        return
    seen.add(here)
    inside = entries(folder)
    folders = [entry for entry in inside if is_folder(entry)]
    yield from (Path(entry.path) for entry in inside if not is_folder(entry))
    for entry in folders:
        yield from walk(entry.path, seen)


def find_images(patterns: Sequence[str]) -> list[Path]:
    """The picture files that `patterns` name, in the order given, each once.

    A file is taken whatever it is called; a folder gives the pictures under it, a glob (`**` crosses folders) those it matches, both told
    by their suffix and in natural order.

    Args:
        patterns: files, folders and globs.

    Raises:
        DataError: a pattern matches nothing, with the nearest name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("a10.png", "a2.png", "notes.txt"):
    ...         Path(folder, name).touch()
    ...     [path.name for path in find_images([folder, f"{folder}/*.png"])]
    ['a2.png', 'a10.png']
    """
    if isinstance(patterns, (str, Path)):
        patterns = [str(patterns)]
    if not patterns:
        raise DataError("No pictures to read: name at least one file, folder or pattern.")
    unique: dict[str, Path] = {}
    for pattern in patterns:
        for path in _matches(str(pattern)):
            unique.setdefault(os.path.realpath(path), path)
    return list(unique.values())


def missing(path: Path) -> str:
    """Say that a path does not exist, which part of it is at fault, and which name is near.

    >>> missing(Path("/nowhere/at/all"))
    'There is no file or folder /nowhere/at/all (/nowhere does not exist).'
    """
    first = path
    while not first.parent.exists():
        first = first.parent
    try:
        near = suggest(first.name, (entry.name for entry in entries(first.parent)))
    except DataError:
        near = ""
    where = "" if first == path else f" ({first} does not exist)"
    return f"There is no file or folder {path}{where}.{near}"


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _pictures(walk(path)) or _nothing(f"The folder {path} holds no pictures")
    if not glob.has_magic(pattern):
        raise DataError(missing(path))
    hits = sorted(glob.glob(str(path), recursive=True), key=natural_key)  # noqa: PTH207 - Path.glob takes no absolute pattern
    found = [picture for hit in map(Path, hits) for picture in (_pictures(walk(hit)) if hit.is_dir() else _pictures([hit]))]
    return found or _nothing(
        f"Nothing matches {pattern}" if not hits else f"{pattern} matches {len(hits)} files or folders, but no pictures"
    )


def _pictures(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.suffix.lower() in SUFFIXES]


def _nothing(what: str) -> list[Path]:
    raise DataError(f"{what}. Pictures end in .jpg, .png, .webp, .tif and the like; a file with another name can be given by its own path.")
