"""Folders of class folders, with or without train, val and test above them.

The layout is read from the folders, never asked for: a `train` folder means parts, unless other folders stand beside it and it holds pictures
itself, for then it is a class of railway pictures. Files that belong to no class are reported, because a picture that a user put one level
too high should not vanish.
"""

from __future__ import annotations

import os
from pathlib import Path

from veneer.errors import DataError

from ..finding import FolderId, entries, folder_id, is_folder, walk
from ..splits import part_of
from .found import Files, Found, Skipped, class_name

Entry = os.DirEntry[str]


def read_folder(root: Path) -> Found:
    """List a folder's pictures with their classes and parts.

    Args:
        root: the folder.

    Raises:
        DataError: no class folders, or a layout that is not clear.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         Path(folder, name).mkdir()
    ...         Path(folder, name, "1.jpg").touch()
    ...     read_folder(Path(folder)).classes
    ['cat', 'dog']
    """
    reading = _Reading(root)
    parts = _part_folders(root)
    if parts:
        named = {name for _, name in parts}
        beside = [entry for entry in entries(root) if entry.name not in named]
        reading.skip_beside(beside, "not in a train, val or test folder")
        for part, name in parts:
            reading.read_classes(root / name, part)
            if part not in reading.parts:
                reading.notes.append(f"{part} has no pictures in class folders")
    else:
        reading.read_classes(root, "")
    first = root / parts[0][1] if parts else root
    if not reading.declared:
        raise DataError(_no_classes(first))
    files = Files(reading.paths)
    declared = list(reading.declared)
    return Found(str(root), "the folders", files, reading.classes, reading.parts, declared, skipped=reading.skipped, notes=reading.notes)


class _Reading:
    """The lists while they grow."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: list[str] = []
        self.classes: list[str] = []
        self.parts: list[str] = []
        self.declared: dict[str, None] = {}
        self.skipped: list[Skipped] = []
        self.notes: list[str] = []

    def read_classes(self, folder: Path, part: str) -> None:
        above = {folder_id(self.root), folder_id(folder)}
        inside = entries(folder)
        self.skip_beside([entry for entry in inside if not is_folder(entry)], "not in a class folder")
        for entry in inside:
            if is_folder(entry):
                self._read_class(entry, part, above)

    def _read_class(self, entry: Entry, part: str, above: set[FolderId]) -> None:
        if folder_id(entry.path) in above:
            self.skipped.append(Skipped(entry.path, "a link to a folder that contains it"))
            return
        name = class_name(entry.name) or entry.name
        self.declared[name] = None
        for path in walk(entry.path, set(above)):
            self.paths.append(str(path))
            self.classes.append(name)
            self.parts.append(part)

    def skip_beside(self, beside: list[Entry], reason: str) -> None:
        self.skipped += [Skipped(entry.path, reason) for entry in beside]


def _part_folders(root: Path) -> list[tuple[str, str]]:
    """(part, folder name) for each split folder, or none when the folder's own folders are classes."""
    folders = [entry.name for entry in entries(root) if is_folder(entry)]
    parts: dict[str, str] = {}
    for name in folders:
        part = part_of(name)
        if part is None:
            continue
        if part in parts:
            raise DataError(f'{root} has two folders for {part}: "{parts[part]}" and "{name}". Keep one.')
        parts[part] = name
    only_parts = len(parts) == len(folders)
    # Beside other folders, a "train" that holds pictures is a class like them.
    in_parts = only_parts or ("train" in parts and _has_folders(root / parts["train"]))
    return [(part, parts[part]) for part in ("train", "val", "test") if part in parts] if in_parts else []


def _has_folders(folder: Path) -> bool:
    return any(is_folder(entry) for entry in entries(folder))


def _no_classes(folder: Path) -> str:
    files = [entry.name for entry in entries(folder) if not is_folder(entry)]
    tables = [name for name in files if name.lower().endswith((".csv", ".tsv", ".parquet"))]
    if tables:
        return f"{folder} has no class folders, but a table: name {folder / tables[0]} to read its pictures and labels."
    held = f", only {len(files)} files" if files else " and is empty"
    return f"{folder} has no class folders{held}. Put each picture in a folder named after its class, such as {folder / 'cat' / '1.jpg'}."
