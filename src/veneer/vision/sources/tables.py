"""Tables of (path, label): CSV, and Parquet whose pictures are paths.

CSV is read by the standard library rather than pandas, which turns the label "01" into 1 and "NA" into nothing. Every value stays the text that
stands in the file, and every report names the line that an editor shows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import DataError

from ..splits import part_of
from .found import Files, Found, Skipped, choose_column, class_name, local_path

SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
IMAGE_COLUMNS = (
    "path", "file", "image", "file_name", "filename", "filepath", "file_path", "image_path", "image_file", "image_name", "img", "img_path",
    "picture", "photo",
)  # fmt: skip
LABEL_COLUMNS = ("label", "class", "category", "target", "labels", "class_name", "label_name", "classname", "y")


def read_table(path: Path, image_column: str | None, label_column: str | None) -> Found:
    """List the pictures of a CSV or Parquet file with their classes and, where it has a column `split`, their parts.

    Args:
        path: the file; its folder is what relative paths are relative to.
        image_column: the column of paths; None: found by its name.
        label_column: the column of labels; None: found by its name.

    Raises:
        DataError: the file cannot be read, or a column is missing or unclear.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = Path(folder, "pets.csv")
    ...     _ = table.write_text("file,species\\n1.jpg,cat\\n2.jpg,dog\\n")
    ...     read_table(table, None, "species").classes
    ['cat', 'dog']
    """
    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path, image_column, label_column)
    header, lines = _read_csv(path)
    columns = choose_columns(header, image_column, label_column, str(path))
    places = [header.index(column) if column else None for column in columns]
    reading = Reading(path)
    for number, values in lines:
        cells = [values[place] if place is not None and place < len(values) else None for place in places]
        reading.add(f"line {number}", *cells, has_parts=columns[2] is not None)
    return reading.found()


def choose_columns(
    known: Sequence[str],
    image_column: str | None,
    label_column: str | None,
    source: str,
    *,
    images: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> tuple[str, str, str | None]:
    """The columns of pictures, labels and parts; `images` and `classes` are those whose type says what they are.

    Raises:
        DataError: a column is missing or unclear.

    >>> choose_columns(["Path", "label", "split"], None, None, "a.csv")
    ('Path', 'label', 'split')
    """
    image = choose_column(image_column, known, IMAGE_COLUMNS, role="the pictures", source=source, option="image_column", among=images)
    rest = [name for name in known if name != image]
    label = choose_column(label_column, rest, LABEL_COLUMNS, role="the labels", source=source, option="label_column", among=classes)
    part = next((name for name in rest if name != label and name.strip().lower() == "split"), None)
    return image, label, part


def read_part(value: Any, where: str) -> str:
    """The part that a cell of the column `split` names.

    Raises:
        DataError: none of them.

    >>> read_part("valid", "a.csv, line 2")
    'val'
    """
    part = part_of(class_name(value))
    if part is None:
        raise DataError(f'{where}: the column "split" says {value!r}; it must be train, val or test. Correct it or rename the column.')
    return part


@dataclass
class Reading:
    """The lists of a table of paths while they grow."""

    table: Path
    paths: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, where: str, picture: Any, label: Any, part: Any, *, has_parts: bool) -> None:
        name, file = class_name(label), class_name(picture)
        note = f"{self.table.name}, {where}"
        if not file or not name:
            self.skipped.append(Skipped(note, "no label" if file else "no path"))
            return
        self.parts.append(read_part(part, note) if has_parts else "")
        self.paths.append(str(local_path(str(picture).strip(), self.table.parent)))
        self.notes.append(note)
        self.classes.append(name)

    def found(self) -> Found:
        declared = list(dict.fromkeys(self.classes))
        files = Files(self.paths, self.notes)
        return Found(str(self.table), 'the column "split"', files, self.classes, self.parts, declared, skipped=self.skipped)


def _read_csv(path: Path) -> tuple[list[str], Iterable[tuple[int, list[str]]]]:
    try:
        # newline="" leaves line ends in quotes to the reader; utf-8-sig drops the mark that spreadsheets put first.
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count))
            lines = [(reader.line_num, values) for values in reader if any(map(str.strip, values))]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as CSV in UTF-8.") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"Cannot read the table {path}: {error}.") from error
    if not lines:
        raise DataError(f"{path} is empty. Its first line must name the columns, such as: path,label")
    return [name.strip() for name in lines[0][1]], lines[1:]


def _read_parquet(path: Path, image_column: str | None, label_column: str | None) -> Found:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        schema = parquet.read_schema(path)
        typed = b"huggingface" in (schema.metadata or {})
        image = None if typed else choose_columns(schema.names, image_column, label_column, str(path), images=_blobs(schema))[0]
        if image is None or not _is_text(schema.field(image).type):
            from .hub import read_parquet

            return read_parquet(path, image_column, label_column)
        columns = choose_columns(schema.names, image_column, label_column, str(path))
        table = parquet.read_table(path, columns=[column for column in columns if column])
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"Cannot read the table {path}: {error}. Is it a whole Parquet file?") from error
    values = [table.column(column).to_pylist() if column else [None] * len(table) for column in columns]
    reading = Reading(path)
    for row, cells in enumerate(zip(*values, strict=True)):
        reading.add(f"row {row}", *cells, has_parts=columns[2] is not None)
    return reading.found()


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _blobs(schema: Any) -> list[str]:
    import pyarrow.types as types

    return [f.name for f in schema if types.is_struct(f.type) or types.is_binary(f.type) or types.is_large_binary(f.type)]
