"""Predictions as rows, and as files by suffix."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk import write_atomically
from ..errors import ConfigError, suggest

if TYPE_CHECKING:
    from .prediction import Prediction

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")


def check_suffix(path: str | Path) -> str:
    """The suffix of a file of answers.

    Raises:
        ConfigError: a suffix that says nothing about the format.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"output: {path} should end in {', '.join(SUFFIXES)}, which decides the format.{suggest(suffix, SUFFIXES)}")
    return suffix


def rows(answers: Sequence[Prediction]) -> list[dict[str, Any]]:
    """One flat row a picture: path, label, probability, label_2, probability_2, …, error."""
    most = max((len(a.top) for a in answers), default=0)
    found = []
    for a in answers:
        row: dict[str, Any] = {"path": str(a.path)}
        for i in range(most):
            label, probability = a.top[i] if i < len(a.top) else (None, None)
            row |= {"label" + (f"_{i + 1}" if i else ""): label, "probability" + (f"_{i + 1}" if i else ""): probability}
        found.append(row | {"error": a.error})
    return found


def write(path: str | Path, answers: Sequence[Prediction]) -> None:
    """Write predictions to a CSV, JSON, JSONL or Parquet file, whole or not at all."""
    suffix, table = check_suffix(path), rows(answers)
    if suffix == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        content = out.getvalue().encode()
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), buffer)
        content = buffer.getvalue()
    elif suffix == ".json":
        content = (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
    else:
        content = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in table).encode()
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target.parent, {target.name: content})
