"""Load a finished run, and name the classes of new pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import CONFIG_NAME, PeftConfig
from ..errors import AdapterFileError, DataError
from ..integrations import install
from ..labels import LABELS_NAME, read
from ..model import PeftModel
from .batches import ahead, logits, pixels
from .data import open_image
from .finding import find_images
from .models import device_named, load_model, load_processor
from .pictures import UnreadableImage


@dataclass(frozen=True)
class Prediction:
    """The classes of one picture, the likeliest first; or why it could not be read.

    Args:
        path: the picture's file.
        top: (label, probability) pairs.
        error: the reason if the picture could not be read.
    """

    path: Path
    top: list[tuple[str, float]]
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The likeliest class."""
        return self.top[0][0] if self.top else None

    @property
    def probability(self) -> float | None:
        """Its probability."""
        return self.top[0][1] if self.top else None


@dataclass(frozen=True)
class Classifier:
    """A model with its adapter, image processor and label names, ready to answer."""

    model: Any
    processor: Any
    labels: list[str]
    batch_size: int = 64


def adapter_directory(run: str | Path) -> Path:
    """The adapter's folder in a run's folder; an adapter's folder is its own.

    Raises:
        AdapterFileError: neither.
    """
    run = Path(run)
    for candidate in (run, run / "adapter"):
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    if not run.exists():
        raise AdapterFileError(f"there is no run {run}; `veneer train` prints the name of the folder it made")
    raise AdapterFileError(f"{run} holds no finished adapter (no {CONFIG_NAME}, nor one in adapter/); train to the end, or resume the run")


def load_classifier(run: str | Path, *, device: str | None = None) -> Classifier:
    """Load a run, or an adapter's folder, with nothing but what the folder and its base model hold.

    Raises:
        AdapterFileError: a folder without adapter or labels, or an adapter of another model.
        ConfigError: no such device, or a base model that cannot be loaded.
    """
    install()
    place = device_named(device)
    directory = adapter_directory(run)
    names = read(directory)
    if names is None:
        raise AdapterFileError(
            f"{directory} has no {LABELS_NAME}, so the classes have no names; it is not an adapter that `veneer train` made"
        )
    labels = list(names.values())
    base = PeftConfig.read(directory).base_model_name_or_path
    if not base:
        raise AdapterFileError(f"{directory / CONFIG_NAME} does not name the base model; add base_model_name_or_path")
    model = PeftModel.from_pretrained(load_model(base, labels), directory).eval()
    return Classifier(model.to(place), load_processor(directory), labels)


def predict(run: str | Path, images: str | Path | Sequence[str | Path], *, top: int = 3, device: str | None = None) -> list[Prediction]:
    """Name the classes of pictures.

    Args:
        run: a run's folder, or an adapter's.
        images: files, folders and glob patterns.
        top: how many classes to give for each.
        device: such as "cpu" or "cuda:1"; by default a GPU if there is one.

    Raises:
        DataError: no picture at all, or none that can be read.
        AdapterFileError: the run cannot be loaded.
    """
    patterns = [images] if isinstance(images, (str, Path)) else list(images)
    paths = find_images([str(p) for p in patterns])
    classifier = load_classifier(run, device=device)
    opened = ahead(lambda path: _prepared(classifier, path), paths)
    answers: list[Prediction] = []
    while batch := list(islice(opened, classifier.batch_size)):
        answers += _answers(classifier, paths[len(answers) : len(answers) + len(batch)], batch, top)
    if all(a.error for a in answers):
        first = "; ".join(f"{a.path}: {a.error}" for a in answers[:3])
        raise DataError(f"none of the {len(answers)} files is a picture that can be read; {first}")
    return answers


def _prepared(classifier: Classifier, path: Path) -> Tensor | str:
    try:
        return pixels(classifier.processor, open_image(path))
    except UnreadableImage as e:
        return e.reason


def _answers(classifier: Classifier, paths: Sequence[Path], opened: Sequence[Tensor | str], top: int) -> list[Prediction]:
    read = [x for x in opened if not isinstance(x, str)]
    probabilities = iter(logits(classifier.model, read, classifier.batch_size).softmax(-1) if read else ())
    return [
        Prediction(path, [], x) if isinstance(x, str) else Prediction(path, _top(next(probabilities), classifier.labels, top))
        for path, x in zip(paths, opened, strict=True)
    ]


def _top(probabilities: Tensor, labels: list[str], k: int) -> list[tuple[str, float]]:
    values, indices = probabilities.topk(min(k, len(labels)))
    return [(labels[i], v) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
