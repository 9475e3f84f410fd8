"""Labelled pictures, ready to train on: read, checked, and divided into train, val and test.

Everything that can be wrong with a user's data is found here, in one pass before the model is loaded, and either listed (one file) or an error
that names the class and the remedy (the task itself). The alternative, to let the training loop find out, costs an epoch to learn of a typing
error. Pictures are not kept in memory: a split knows where its pictures lie and opens them when asked, in worker processes too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from veneer.errors import DataError, suggest

from .checking import readable
from .finding import find_images, natural_key
from .pictures import UnreadableImage, open_image
from .sources import Found, Pictures, Skipped, class_name, read_source
from .splits import check_fraction, stratified

__all__ = ["ImageData", "Skipped", "Split", "UnreadableImage", "find_images", "load_data", "load_labelled", "open_image"]


@dataclass(eq=False)
class Split:
    """Labelled pictures that are opened when asked for; small enough to send to a worker process.

    Args:
        labels: each picture's label, an index into the list of class names.
        pictures: where they are read from.
        rows: each picture's row there.
        name: the part it is: "train", "val", "test" or "all".

    >>> from veneer.vision.sources import Files
    >>> split = Split([0, 1, 0], Files(["a.jpg", "b.jpg", "c.jpg"]), [0, 1, 2])
    >>> split.take([2, 1]).labels, split.take([2]).source(0)
    ([0, 1], 'c.jpg')
    """

    labels: list[int]
    pictures: Pictures
    rows: list[int]
    name: str = "all"

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """The picture, RGB and upright; `UnreadableImage` if it has gone since it was checked."""
        return self.pictures.image(self.rows[index])

    def source(self, index: int) -> str:
        """Where the picture comes from: its path, or its row."""
        return self.pictures.source(self.rows[index])

    def take(self, indices: Iterable[int]) -> Split:
        """The split of these pictures, in this order."""
        chosen = list(indices)
        return Split([self.labels[i] for i in chosen], self.pictures, [self.rows[i] for i in chosen], self.name)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A classification task.

    Args:
        labels: the class names; a label is an index into them.
        train: pictures to learn from.
        val: pictures to choose and stop by.
        test: pictures kept apart, if the source has them.
        skipped: files and rows that were left out, with reasons.
        origin: one sentence on how the parts came about, and what is odd about them.
    """

    labels: list[str]
    train: Split
    val: Split
    test: Split | None
    skipped: list[Skipped]
    origin: str


def load_data(
    source: str | Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageData:
    """Read labelled pictures, check that each can be opened, and divide them into train and val unless the source does.

    Class names are in natural order ("2" before "10"), or in a data set's own. The division is stratified and the same on every machine.

    Args:
        source: a folder of class folders, with or without train, val and test above them; a CSV or Parquet file of paths and labels; a data
            set saved by the `datasets` library, or its name on the hub.
        seed: of the division.
        val_fraction: the share of the pictures, or of train, that becomes val where the source has none.
        image_column: the column of pictures, where a table's own names do not tell.
        label_column: the column of labels, likewise.

    Raises:
        DataError: no such source, a column is missing, no readable pictures, a class without any, fewer than two classes, or a class that only
            val or test has.
        ConfigError: `val_fraction` is not between 0 and 1.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         Path(folder, name).mkdir()
    ...         for i in range(5):
    ...             Image.new("RGB", (8, 8), (i, len(name), ord(name[0]))).save(f"{folder}/{name}/{i}.png")
    ...     data = load_data(folder)
    >>> data.labels, len(data.train), len(data.val), data.test
    (['cat', 'dog'], 8, 2, None)
    """
    check_fraction(val_fraction)
    found = read_source(source, image_column, label_column)
    digests, unreadable = readable(found, _labelled(found))
    skipped = [*found.skipped, *unreadable]
    _refuse_nothing(found, digests, skipped)
    parts: dict[str, list[int]] = {}
    for row in digests:
        parts.setdefault(found.parts[row] or "train", []).append(row)
    _refuse_gaps(found, parts)
    present = {found.classes[row] for row in parts["train"]}
    labels = [name for name in found.order if name in present] if found.order else sorted(present, key=natural_key)
    parts, origin = _divided(found, parts, digests, val_fraction, seed)
    notes = [*found.notes, *_notes(found, parts, digests, labels)]
    number = {name: i for i, name in enumerate(labels)}
    train, val, test = (_split(found, parts.get(part, []), number, part) for part in ("train", "val", "test"))
    return ImageData(labels, train, val, test if len(test) else None, skipped, "; ".join([origin, *notes]))


def load_labelled(
    source: str | Path, labels: Sequence[str], *, image_column: str | None = None, label_column: str | None = None
) -> tuple[Split, list[Skipped]]:
    """Read labelled pictures for a model whose classes are known: the test part if there is one, else val, else all.

    Args:
        source: as for `load_data`.
        labels: the model's class names, in its order; the source need not have all of them.
        image_column: as for `load_data`.
        label_column: as for `load_data`.

    Returns:
        The pictures, whose `name` says which part they are, and what was left out.

    Raises:
        DataError: a class that the model does not know, with the nearest name; or as `load_data`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "dog").mkdir()
    ...     Image.new("RGB", (8, 8)).save(f"{folder}/dog/1.png")
    ...     load_labelled(folder, ["cat", "dog"])[0].labels
    [1]
    """
    found = read_source(source, image_column, label_column)
    number = {class_name(name): i for i, name in enumerate(labels)}
    listed = _labelled(found)
    part = next((part for part in ("test", "val", "train") if any(found.parts[row] == part for row in listed)), "")
    rows = [row for row in listed if found.parts[row] == part]
    for name in dict.fromkeys(found.classes[row] for row in rows):
        if name not in number:
            known = ", ".join(labels[:10]) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
            raise DataError(
                f'The model does not know the class "{name}" of {found.name}.{suggest(name, number)} It knows: {known}. '
                "Rename the class or leave its pictures out."
            )
    digests, unreadable = readable(found, rows)
    skipped = [*found.skipped, *unreadable]
    _refuse_nothing(found, digests, skipped)
    return _split(found, list(digests), number, part or "all"), skipped


def _labelled(found: Found) -> list[int]:
    return [row for row, name in enumerate(found.classes) if name]


def _split(found: Found, rows: list[int], number: dict[str, int], name: str) -> Split:
    return Split([number[found.classes[row]] for row in rows], found.pictures, rows, name)


def _refuse_nothing(found: Found, digests: dict[int, bytes], skipped: list[Skipped]) -> None:
    if digests:
        return
    if not skipped:
        raise DataError(f"{found.name} holds no pictures. Add some, each under its class.")
    first = "; ".join(f"{item.source}: {item.reason}" for item in skipped[:3])
    raise DataError(f"None of the {len(skipped)} files or rows of {found.name} is a picture that can be used. The first: {first}.")


def _refuse_gaps(found: Found, parts: dict[str, list[int]]) -> None:
    """Every class must be there to learn from."""
    having = {part: {found.classes[row] for row in rows} for part, rows in parts.items()}
    present = having.get("train", set())
    if any(found.parts) and "train" not in found.parts:
        given = " and ".join(part for part in ("val", "test") if part in parts)
        raise DataError(f"{found.name} has no train part, only {given}. Add one; to measure a trained model, evaluate it instead.")
    for part in ("train", *dict.fromkeys(found.parts)):
        if part and part not in parts:
            raise DataError(f"The {part} part of {found.name} holds no readable picture. Add pictures to it, or leave it out.")
    for name in found.declared:
        if name in present:
            continue
        others = [part for part in ("val", "test") if name in having.get(part, set())]
        if others:
            raise DataError(
                f'The class "{name}" has pictures in {" and ".join(others)} of {found.name}, but none in train, so it could not be learnt. '
                "Add pictures to train, or remove the class."
            )
        raise DataError(f'The class "{name}" of {found.name} has no readable picture. Add pictures to it, or remove it.')
    if len(present) < 2:
        only = next(iter(present))
        raise DataError(f'{found.name} has a single class, "{only}", and to classify takes at least two.{_layout_hint(found, only)}')


def _layout_hint(found: Found, only: str) -> str:
    """A folder that holds nothing but the data set is an easy mistake, left behind by unpacking an archive."""
    inside = Path(found.name) / only
    if inside.is_dir() and any(entry.is_dir() for entry in inside.iterdir()):
        return f" If the classes are the folders inside it, name {inside} instead."
    return " Add a folder or label for each of the others."


def _divided(
    found: Found, parts: dict[str, list[int]], digests: dict[int, bytes], val_fraction: float, seed: int
) -> tuple[dict[str, list[int]], str]:
    """The parts with a val among them, and how they came about."""
    given = [part for part in ("train", "val", "test") if part in parts]
    if "val" in parts:
        return parts, f"{', '.join(given[:-1])} and {given[-1]} as given by {found.by}"
    pool = parts["train"]
    train, val = stratified([found.classes[row] for row in pool], val_fraction, seed, [digests[row] for row in pool])
    whole = "train" if any(found.parts[row] for row in pool) else "the pictures"
    origin = f"val is a stratified {100 * val_fraction:g} % of {whole}, chosen with seed {seed}"
    if "test" in parts:
        origin += f"; test as given by {found.by}"
    return {**parts, "train": [pool[i] for i in train], "val": [pool[i] for i in val]}, origin


def _notes(found: Found, parts: dict[str, list[int]], digests: dict[int, bytes], labels: list[str]) -> list[str]:
    notes = []
    learnt = {digests[row] for row in parts["train"]}
    for part in ("val", "test"):
        rows = parts.get(part, [])
        having = {found.classes[row] for row in rows}
        lacking = [f'"{name}"' for name in labels if name not in having] if rows else []
        if lacking:
            notes.append(
                f"{part} has no picture of {', '.join(lacking[:5])}" + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
            )
        copies = sum(digests[row] in learnt for row in rows)
        if copies:
            notes.append(f"{copies} of the {len(rows)} pictures in {part} {'is' if copies == 1 else 'are'} in train too, byte for byte")
    return notes
