"""What an evaluation looks like: tables for people, CSV for machines, the confusion matrix as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..disk import write_atomically
from .evaluation import Evaluation


def per_class_csv(evaluation: Evaluation) -> str:
    """The per-class table as CSV; an empty cell where a share of nothing is asked for."""
    rows = evaluation.per_class()
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def confusion_csv(evaluation: Evaluation) -> str:
    """The confusion matrix as CSV: a row for each true class, a column for each named one."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["true \\ named", *evaluation.labels])
    writer.writerows([label, *row.tolist()] for label, row in zip(evaluation.labels, evaluation.confusion, strict=True))
    return out.getvalue()


def confusion_png(evaluation: Evaluation) -> bytes:
    """The confusion matrix as a picture, each row as shares of its class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(evaluation.labels)
    side = min(16.0, 2.5 + 0.45 * n)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = evaluation.confusion / evaluation.confusion.sum(1, keepdims=True).clip(1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="named", ylabel="true", title=f"accuracy {evaluation.accuracy:.1%} of {evaluation.total}")
    if n <= 60:
        axes.set_xticks(range(n), evaluation.labels, rotation=90)
        axes.set_yticks(range(n), evaluation.labels)
    if n <= 25:
        for i, j in zip(*evaluation.confusion.nonzero(), strict=True):
            axes.text(
                j,
                i,
                str(evaluation.confusion[i, j]),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if shares[i, j] > 0.5 else "black",
            )
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def write_report(evaluation: Evaluation, directory: Path) -> None:
    """Write `per_class.csv`, `confusion.csv` and `confusion.png` into a directory."""
    files = {
        "per_class.csv": per_class_csv(evaluation).encode(),
        "confusion.csv": confusion_csv(evaluation).encode(),
        "confusion.png": confusion_png(evaluation),
    }
    write_atomically(directory, files)


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under headings, aligned: text to the left, numbers to the right.

    >>> print(table(["class", "pictures"], [["cat", 12], ["zebra", 3]]))
    class  pictures
    cat          12
    zebra         3
    """
    cells = [list(headings), *([_cell(c) for c in row] for row in rows)]
    numeric = [all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(headings))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = ["  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def per_class_table(evaluation: Evaluation, most: int = 30) -> str:
    """The per-class table for a terminal: with many classes, the worst by F1."""
    rows = evaluation.per_class()
    shown = rows if len(rows) <= most else sorted(rows, key=lambda r: (r["f1"] is None, r["f1"] or 0.0))[:most]
    text = table(list(rows[0]), [list(r.values()) for r in shown])
    return text if len(rows) <= most else f"{text}\n({most} of {len(rows)} classes, the worst by F1; per_class.csv has all)"
