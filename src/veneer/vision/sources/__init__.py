"""The kinds of source, told apart by what lies at the path; a hub name is tried only where nothing does."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import DataError

from .folders import read_folder
from .found import Files, Found, Pictures, Skipped, class_name
from .hub import is_saved, read_hub, read_saved
from .tables import SUFFIXES, read_table

__all__ = ["Files", "Found", "Pictures", "Skipped", "class_name", "read_source"]


def read_source(source: str | Path, image_column: str | None = None, label_column: str | None = None) -> Found:
    """List what a source holds, whatever kind it is; nothing is opened or decoded yet.

    Args:
        source: a folder, a CSV or Parquet file, a saved data set, or a data set's name on the hub.
        image_column: the column of pictures, where there are columns.
        label_column: the column of labels, where there are columns.

    Raises:
        DataError: nothing of that name, or its layout or columns are not clear.

    >>> read_source("/nowhere")
    Traceback (most recent call last):
    veneer.errors.DataError: There is no file or folder /nowhere.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if is_saved(path):
            return read_saved(path, image_column, label_column)
        if image_column or label_column:
            raise DataError(
                f"{path} is a folder, whose classes are its sub-folders; image_column and label_column are for tables. Leave them out."
            )
        return read_folder(path)
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            return read_table(path, image_column, label_column)
        raise DataError(f"{path} is neither a folder nor a table ({', '.join(SUFFIXES)}). Unpack an archive and name its folder.")
    return read_hub(str(source), image_column, label_column)
