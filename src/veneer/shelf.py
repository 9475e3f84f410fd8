"""Where packed adapters wait, and what is moved on when a budget is full: the least recently used, to the CPU or to disk.

Nothing moves by itself without a budget. On disk each adapter is a folder in the public format. What Veneer wrote there it knows by its digest, so that an adapter which
somebody else has changed meanwhile is refused instead of run.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from .budget import Budget
from .config import CONFIG_NAME, PeftConfig
from .disk import write_atomically
from .errors import AdapterFileError, StateError
from .labels import written
from .packing import Packed, Pattern

_TENSORS, _BESIDE = "adapter_model.safetensors", "held.safetensors"


@dataclass
class Folder:
    """An adapter on disk.

    Args:
        path: its directory.
        digests: of its files, by name.
        owned: whether this model wrote it, and may write and remove it.
    """

    path: Path
    digests: dict[str, str]
    owned: bool = True

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"owned": False}  # a copy of the model must not write over what the first one reads


@dataclass(eq=False, repr=False)
class Waiting:
    """One adapter on the shelf.

    Args:
        packed: its tensors.
        config: its configuration.
        labels: the names of its labels, if its head has any.
        near: whether its tensors are in the memory that the budget counts.
        folder: where it lies on disk as it is.
    """

    packed: Packed
    config: PeftConfig
    labels: Mapping[int, str] | None
    near: bool = True
    folder: Folder | None = None


@dataclass(eq=False, repr=False)
class Shelf:
    """The packed adapters of one model, and how much may be kept where."""

    waiting: dict[str, Waiting] = field(default_factory=dict)
    used: dict[str, None] = field(default_factory=dict)
    """Every adapter of the model, the least recently used first."""
    patterns: list[Pattern] = field(default_factory=list)
    known: dict[str, Pattern] = field(default_factory=dict)
    """Patterns by the configuration that a file had."""
    folders: dict[str, Folder] = field(default_factory=dict)
    """Where adapters that are attached now were on disk."""
    budget: Budget = field(default_factory=Budget)

    def __contains__(self, name: str) -> bool:
        return name in self.waiting

    def at(self, path: str) -> list[str]:
        """The packed adapters that have something at a module."""
        patterns = ((n, w.packed.pattern) for n, w in self.waiting.items())
        return [n for n, p in patterns if path in p.places or path in p.copies]

    def touch(self, name: str) -> None:
        """Note that an adapter is used now."""
        self.used.pop(name, None)
        self.used[name] = None

    def fetch(self, name: str) -> Packed | None:
        """A packed adapter, with its tensors at hand, for which others may be moved away; None where none of that name is packed.

        Raises:
            AdapterFileError: its folder was changed or removed meanwhile.
        """
        found = self.waiting.get(name)
        if found is None:
            return None
        self.touch(name)
        if not found.near:
            _read(name, found)
            self.settle(name)
        return found.packed

    def read(self, name: str) -> Packed:
        """A packed adapter with its tensors at hand, to be attached, so whatever the budget for packed ones is.

        Raises:
            AdapterFileError: its folder was changed or removed meanwhile.
        """
        found = self.waiting[name]
        if not found.near:
            _read(name, found)
        return found.packed

    def take(self, name: str) -> None:
        """Take an adapter off the shelf, because it is attached."""
        found = self.waiting.pop(name)
        if found.folder is not None:
            self.folders[name] = found.folder

    def put(self, name: str, packed: Packed, config: PeftConfig, labels: Mapping[int, str] | None) -> None:
        """Put an adapter on the shelf; `settle` is to follow."""
        self.waiting[name] = Waiting(packed, config, labels)
        self.used.setdefault(name)

    def settle(self, keep: str | None = None) -> None:
        """Move the least recently used adapters away until the others are within the budget.

        Args:
            keep: stays, because it is needed now.

        Raises:
            AdapterFileError: the directory cannot be written; what could not be moved stays where it was.
        """
        limit = self.budget.device_bytes
        if limit is None:
            return
        near = {n: self.waiting[n].packed.nbytes for n in self.used if n in self.waiting and self.waiting[n].near}
        total = sum(near.values())
        for name, size in near.items():
            if total <= limit:
                break
            if name != keep:
                self._move(name)
                total -= size

    def check_fits(self, names: Iterable[str]) -> None:
        """Raise StateError where packed adapters that are read together are larger than the budget, so that each layer would move them."""
        limit = self.budget.device_bytes
        total = sum(self.waiting[n].packed.nbytes for n in set(names) if n in self.waiting)
        if limit is not None and total > limit:
            raise StateError(
                f"the packed adapters of this batch have {total:,} bytes, and the budget for packed adapters is {limit:,} (device_bytes of hold); "
                "give it more, or name fewer adapters at once"
            )

    def _move(self, name: str) -> None:
        """Move an adapter's tensors to the CPU or to disk."""
        found = self.waiting[name]
        if self.budget.offload == "cpu":
            found.packed.packs = [t.cpu() for t in found.packed.packs]
        else:
            assert isinstance(self.budget.offload, Path)
            found.folder = _written(name, found, self.folders.pop(name, None) or found.folder, self.budget.offload)
            found.packed.packs = []
        found.near = False

    def forget(self, name: str) -> None:
        """Take an adapter out of everything, with the folder that was written for it."""
        found = self.waiting.pop(name, None)
        self.used.pop(name, None)
        for folder in (self.folders.pop(name, None), None if found is None else found.folder):
            if folder is not None and folder.owned:
                shutil.rmtree(folder.path, ignore_errors=True)

    def where(self, name: str) -> str:
        """Where an adapter is: "attached", "packed", "cpu" or "disk"."""
        found = self.waiting.get(name)
        if found is None:
            return "attached"
        return "packed" if found.near else "cpu" if found.packed.packs else "disk"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _written(name: str, found: Waiting, before: Folder | None, directory: Path) -> Folder:
    """The folder of an adapter, written unless it is there as it is."""
    of_parts = any(s.is_part for s in found.packed.pattern.plan.sites)
    files = {CONFIG_NAME: found.config.to_json(of_parts=of_parts).encode(), _TENSORS: _serialised(_of_file(found)), **written(found.labels)}
    if found.packed.pattern.beside:
        files[_BESIDE] = _serialised(found.packed.beside())
    digests = {n: _digest(content) for n, content in files.items()}
    mine = before is not None and before.owned and before.path.parent == directory
    try:
        if before is not None and before.digests == digests and not _changed(before):
            return before
        path = before.path if mine and before is not None else _free(directory / name)
        write_atomically(path, files)
    except OSError as e:
        raise AdapterFileError(f"adapter {name!r} cannot be moved to {directory}: {e.strerror or e}; it stays in memory") from e
    return Folder(path, digests)


def _of_file(found: Waiting) -> dict[str, Tensor]:
    constants = found.packed.pattern.shared if found.config.writes_shared else None
    more = {} if constants is None else {f"base_model.{key}": t for key, t in constants.named_buffers()}
    return found.packed.file_tensors() | more


def _serialised(tensors: Mapping[str, Tensor]) -> bytes:
    return save({k: t.detach().cpu().clone() for k, t in sorted(tensors.items())}, metadata={"format": "pt"})


def _free(path: Path) -> Path:
    """The path, or one with a number behind it where something lies there that is not ours."""
    tries = (path if i == 1 else path.with_name(f"{path.name}-{i}") for i in range(1, 10**6))
    return next(p for p in tries if not p.exists())


def _changed(folder: Folder) -> str | None:
    """The first file that is not as it was written."""
    for file, digest in folder.digests.items():
        path = folder.path / file
        if not path.is_file() or _digest(path.read_bytes()) != digest:
            return file
    return None


@torch.no_grad()
def _read(name: str, found: Waiting) -> None:
    """Bring an adapter's tensors back into memory."""
    if found.packed.packs or found.folder is None:
        found.near = True  # from the CPU a pack moves when a layer asks for it
        return
    folder = found.folder
    try:
        changed = _changed(folder)
        if changed is not None:
            raise AdapterFileError(
                f"adapter {name!r} waits in {folder.path}, where {changed} was changed or removed since Veneer wrote it, so it is not used; "
                f"put the file back, or delete_adapter({name!r}) and load the adapter anew"
            )
        tensors = load((folder.path / _TENSORS).read_bytes())
        beside = load((folder.path / _BESIDE).read_bytes()) if found.packed.pattern.beside else {}
    except OSError as e:
        raise AdapterFileError(f"adapter {name!r} cannot be read from {folder.path}: {e.strerror or e}") from e
    packs = [torch.empty(n, dtype=dtype) for dtype, n in found.packed.pattern.packs]
    found.packed.packs = packs
    for spans, values in ((found.packed.pattern.names, tensors), (found.packed.pattern.beside, beside)):
        for key, span in spans.items():
            found.packed.tensor(span).copy_(values[key])
    found.near = True
