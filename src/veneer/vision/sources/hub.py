"""Data sets of the `datasets` library: saved on disk, in a Parquet file with the pictures inside, or named on the hub.

The library would decode pictures itself, without turning them upright and into whatever mode they have; so its decoding is switched off, and
the bytes go through `pictures` like every other file. The data set stays memory-mapped: a split holds a reference and row numbers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from veneer.errors import DataError

from ..finding import missing
from ..network import hub_reachable
from ..splits import part_of
from .found import Found, Pictures, Rows, Several, Skipped, class_name
from .tables import choose_columns, read_part

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`.

    >>> is_saved(Path("/nowhere"))
    False
    """
    return (folder / "dataset_dict.json").is_file() or ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file())


def read_saved(folder: Path, image_column: str | None, label_column: str | None) -> Found:
    """List a `Dataset` or `DatasetDict` that was saved with `save_to_disk`.

    Args:
        folder: where it was saved.
        image_column: the column of pictures; None: found by its type, then its name.
        label_column: the column of labels; None: found by its type, then its name.

    Raises:
        DataError: it cannot be read, or a column is missing or unclear.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder} looks like a saved data set, but cannot be loaded: {_first_line(error)}. Save it again.") from error
    return _read(loaded, str(folder), folder, image_column, label_column)


def read_parquet(path: Path, image_column: str | None, label_column: str | None) -> Found:
    """List a Parquet file that holds the pictures themselves, or that `datasets` wrote.

    Args:
        path: the file.
        image_column: as `read_saved`.
        label_column: as `read_saved`.

    Raises:
        DataError: as `read_saved`.
    """
    import datasets

    try:
        loaded = datasets.Dataset.from_parquet(str(path))
    except Exception as error:
        raise DataError(f"Cannot read the table {path}: {_first_line(error)}.") from error
    return _read(loaded, str(path), path.parent, image_column, label_column)


def read_hub(name: str, image_column: str | None, label_column: str | None) -> Found:
    """List a data set of the hub, downloading it unless it is in the cache or `HF_HUB_OFFLINE` is set.

    Args:
        name: "name" or "organisation/name".
        image_column: as `read_saved`.
        label_column: as `read_saved`.

    Raises:
        DataError: neither a local path nor a data set that can be loaded; or as `read_saved`.

    >>> read_hub("/nowhere/pets", None, None)
    Traceback (most recent call last):
    veneer.errors.DataError: There is no file or folder /nowhere/pets (/nowhere does not exist).
    """
    nothing = missing(Path(name))
    if not HUB_NAME.fullmatch(name):
        raise DataError(nothing)
    import datasets
    from datasets import packaged_modules

    # "csv" and the like name loaders, which would read whatever lies in the working directory.
    if name in getattr(packaged_modules, "_PACKAGED_DATASETS_MODULES", {}):
        raise DataError(nothing)
    reachable = hub_reachable()
    config = None if reachable else datasets.DownloadConfig(local_files_only=True, max_retries=0)
    try:
        loaded = datasets.load_dataset(name, download_config=config)
    except Exception as error:
        offline = (
            "" if reachable else " The hub cannot be reached from here (or HF_HUB_OFFLINE is set), so only the local cache was searched."
        )
        raise DataError(
            f'{nothing} Nor could a data set "{name}" be loaded from the Hugging Face hub: {_first_line(error)}.{offline} '
            "Correct the path, or the data set's name."
        ) from error
    return _read(loaded, name, Path.cwd(), image_column, label_column)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _read(loaded: Any, name: str, base: Path, image_column: str | None, label_column: str | None) -> Found:
    members, notes = _members(loaded, name)
    pictures: list[Pictures] = []
    classes: list[str] = []
    parts: list[str] = []
    skipped: list[Skipped] = []
    order: list[str] | None = None
    for part, label, dataset in members:
        rows, names, own_parts, own_order = _read_one(dataset, label, name, base, image_column, label_column)
        skipped += _unlabelled(rows, names)
        pictures.append(rows)
        classes += names
        parts += own_parts if own_parts and len(members) == 1 else [part] * len(names)
        order = order or own_order
    by = 'the column "split"' if len(members) == 1 else "the data set"
    declared = [text for text in dict.fromkeys(classes) if text]
    unused = [text for text in order or [] if text not in declared]
    if unused:
        notes.append(f"left out: classes without a single picture ({_some(unused)})")
    joined = pictures[0] if len(pictures) == 1 else Several(pictures)
    return Found(name, by, joined, classes, parts, declared, order, skipped, notes)


def _is_blob(kind: Any) -> bool:
    """Encoded pictures whose column was not declared as one."""
    return "bytes" in kind if isinstance(kind, dict) else getattr(kind, "dtype", "") in ("binary", "large_binary")


def _unlabelled(rows: Rows, names: list[str]) -> list[Skipped]:
    if names and not any(names):
        return [Skipped(f"{rows.name} rows 0 to {len(names) - 1}".strip(), "no label")]
    return [Skipped(rows.source(i), "no label") for i, text in enumerate(names) if not text]


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _members(loaded: Any, name: str) -> tuple[list[tuple[str, str, Any]], list[str]]:
    """(part, its name there, data set) for every part that is used, and notes on the others."""
    if not isinstance(loaded, dict):
        return [("", "", loaded)], []
    if len(loaded) == 1:
        return [("", key, dataset) for key, dataset in loaded.items()], []
    members: dict[str, tuple[str, Any]] = {}
    others = []
    for key, dataset in loaded.items():
        part = part_of(str(key))
        if part is None:
            others.append(str(key))
        elif part in members:
            raise DataError(f'{name} has two splits for {part}: "{members[part][0]}" and "{key}". Remove one and save it again.')
        else:
            members[part] = (str(key), dataset)
    if not members:
        raise DataError(f"{name} has the splits {_some(others)}; none is called train, val or test. Rename them and save it again.")
    notes = [f"left out: the splits {_some(others)}"] if others else []
    return [(part, key, dataset) for part, (key, dataset) in members.items()], notes


def _read_one(
    dataset: Any, part: str, name: str, base: Path, image_column: str | None, label_column: str | None
) -> tuple[Rows, list[str], list[str], list[str] | None]:
    """Pictures, class names, parts by the column `split` if there is one, and the classes' own order if there is one."""
    from datasets import ClassLabel, Image, Value

    dataset = dataset.with_format(None)
    features = dict(dataset.features)
    image, label, split = choose_columns(
        list(features),
        image_column,
        label_column,
        name,
        images=[key for key, kind in features.items() if isinstance(kind, Image)] or [k for k, kind in features.items() if _is_blob(kind)],
        classes=[key for key, kind in features.items() if isinstance(kind, ClassLabel)],
    )
    if isinstance(features[image], Image):
        dataset = dataset.cast_column(image, Image(decode=False))
    kind = features[label]
    if not isinstance(kind, (ClassLabel, Value)):
        raise DataError(
            f'{name}: the column "{label}" holds {type(kind).__name__}, not one class per picture. Name another with label_column.'
        )
    values = dataset.select_columns([label])[:][label]
    order = [class_name(text) for text in kind.names] if isinstance(kind, ClassLabel) else None
    # A ClassLabel of -1 is how unlabelled test sets are published.
    names = [class_name(v) if order is None else order[v] if v is not None and v >= 0 else "" for v in values]
    rows = Rows(dataset.select_columns([image]), image, str(base), part)
    splits = dataset.select_columns([split])[:][split] if split else []
    return rows, names, [read_part(value, f"{name}, row {i}") for i, value in enumerate(splits)], order
