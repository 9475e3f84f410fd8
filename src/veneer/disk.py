"""Directories: write one so that a crash cannot leave half of it, and find one here or on the hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import AdapterFileError, suggest

HUB_ARGUMENTS = {"revision", "token", "cache_dir", "force_download", "local_files_only"}


def write_atomically(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a directory so that a crash leaves each either whole or as it was.

    A new directory appears with all its files at once; in an existing one, every file is complete on disk before the first is put in place.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise AdapterFileError(f"{directory} is a file; give the name of a directory to save into")
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = not directory.exists()
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent if fresh else directory))
    try:
        for name, content in files.items():
            with (staging / name).open("wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
        if fresh:
            staging.chmod(0o777 & ~_umask())
            staging.rename(directory)
        else:
            for name in files:
                (staging / name).replace(directory / name)
    finally:
        if staging.exists():
            shutil.rmtree(staging)
    _sync(directory.parent if fresh else directory)


@contextmanager
def built_atomically(directory: Path) -> Iterator[Path]:
    """A directory to fill inside the block, which takes its place when the block ends well, and else is gone.

    Raises:
        AdapterFileError: there is something in that place already.
    """
    refuse_taken(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                with path.open("rb") as f:
                    os.fsync(f.fileno())
        staging.chmod(0o777 & ~_umask())
        if directory.is_dir():
            directory.rmdir()
        staging.rename(directory)
    finally:
        if staging.exists():
            shutil.rmtree(staging)
    _sync(directory.parent)


def refuse_taken(directory: Path) -> None:
    """Raise AdapterFileError where a file, or a directory that is not empty, is in the way."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise AdapterFileError(f"{directory} is there already and not empty; give another name, or remove it first")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(directory: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def locate(source: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any) -> Path:
    """The local directory of an adapter: a path as it is, or a hub repository, downloaded.

    Args:
        source: a directory, or `owner/name` on the hub.
        subfolder: a folder inside it.
        hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` of `huggingface_hub.snapshot_download`.

    Raises:
        AdapterFileError: neither a directory nor a repository that can be read.
    """
    hub = {k: v for k, v in hub.items() if v is not None or k in HUB_ARGUMENTS}  # callers pass on whatever they might have been given
    wrong = sorted(set(hub) - HUB_ARGUMENTS)
    if wrong:
        raise TypeError(f"unexpected argument {wrong[0]!r}.{suggest(wrong[0], HUB_ARGUMENTS)}")
    path = Path(source)
    if not path.is_dir():
        path = _download(str(source), subfolder, hub)
    return path / subfolder if subfolder else path


def _download(repo: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    base = f"{subfolder}/" if subfolder else ""
    try:
        return Path(snapshot_download(repo, allow_patterns=[base + "*.safetensors", base + "*.json"], **hub))
    except HFValidationError:
        raise AdapterFileError(
            f"{repo} is not a directory here, and cannot be a repository's name (owner/name); check the path.{_nearby(repo)}"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise AdapterFileError(f"{repo} is not a directory here, and could not be fetched from the hub: {reason}{_nearby(repo)}") from e


def _nearby(path: str) -> str:
    """The folder that may have been meant, as the end of a message."""
    wanted = Path(path)
    try:
        beside = [p.name for p in wanted.parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    return suggest(wanted.name, beside)
