"""Hold a finished run against labelled pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .batches import split_logits
from .data import Skipped, Split, load_labelled
from .prediction import Classifier, load_classifier
from .statistics import wilson_interval


@dataclass(frozen=True)
class Evaluation:
    """How well a classifier names pictures whose class is known.

    Args:
        labels: class names.
        confusion: counts, (true class, named class).
        skipped: pictures that could not be read.
        part: the part of the data that they are: "train", "val", "test" or "all".
    """

    labels: list[str]
    confusion: np.ndarray
    skipped: list[Skipped]
    part: str = "all"

    @property
    def total(self) -> int:
        """The number of pictures."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """The number named rightly."""
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        """correct / total."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy (Wilson)."""
        return wilson_interval(self.correct, self.total)

    def per_class(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and number of pictures of every class; None where a share of nothing is asked for."""
        rows = []
        for i, label in enumerate(self.labels):
            hit, named, true = int(self.confusion[i, i]), int(self.confusion[:, i].sum()), int(self.confusion[i].sum())
            precision, recall = (hit / named if named else None), (hit / true if true else None)
            f1 = 2 * hit / (named + true) if named + true else None
            rows.append({"class": label, "precision": precision, "recall": recall, "f1": f1, "pictures": true})
        return rows

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that occur."""
        scores = [r["f1"] for r in self.per_class() if r["pictures"]]
        return float(np.mean(scores))

    def metrics(self) -> dict[str, Any]:
        """Accuracy with its interval, macro F1, and the number of pictures."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "accuracy_low": low, "accuracy_high": high, "macro_f1": self.macro_f1, "pictures": self.total}


def evaluate(
    run: str | Path, data: str | Path, *, image_column: str | None = None, label_column: str | None = None, device: str | None = None
) -> Evaluation:
    """Evaluate a run on labelled pictures, in any form that `train` reads: the test part if there is one, else val, else all.

    Args:
        run: a run's folder, or an adapter's.
        data: labelled pictures.
        image_column: the column of pictures, where a table's own names do not tell.
        label_column: the column of labels, likewise.
        device: such as "cpu" or "cuda:1"; by default a GPU if there is one.

    Raises:
        DataError: a class that the run does not know, or no picture that can be read.
        AdapterFileError: the run cannot be loaded.
    """
    classifier = load_classifier(run, device=device)
    split, skipped = load_labelled(data, classifier.labels, image_column=image_column, label_column=label_column)
    return evaluate_split(classifier, split, skipped)


def evaluate_split(classifier: Classifier, split: Split, skipped: Sequence[Skipped] = ()) -> Evaluation:
    """Evaluate on a split that is loaded already."""
    n = len(classifier.labels)
    confusion = np.zeros((n, n), dtype=np.int64)
    named = split_logits(classifier.model, classifier.processor, split, classifier.batch_size).argmax(-1).tolist()
    np.add.at(confusion, (split.labels, named), 1)
    return Evaluation(classifier.labels, confusion, list(skipped), split.name)
