"""`veneer demo`: the bundled vision transformer, which has seen only letters, learns real scanned digits.

The demo measures three uses of one pretrained model on the same held-out fifth: nearest neighbour and a linear probe on its frozen features,
then LoRA. The first two are the honest baselines of fine-tuning: an adapter that does not beat them would be work for nothing. The data are
the 1,797 digits that scikit-learn carries (UCI, scanned handwriting of 43 people, 8 x 8 pixels), because nothing is downloaded here.
They are written to disk as pictures in class folders and go through `veneer.vision.train` like anyone's own, not through a door of their own.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .statistics import wilson_interval

if TYPE_CHECKING:
    from .data import Split

PICTURES = 1797
SIDE = 32  # the digits' 8 pixels, four times as large, so that a person can look at the files
SHOWN = 6

# Rate and targets were found on a validation fifth of the training pictures. The model is too small for bf16 to be faster.
SETTINGS: dict[str, Any] = {
    "model": "demo",
    "method": "lora",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "learning_rate": 2e-3,
    "batch_size": 32,
    "workers": 1,
    "val_fraction": 0.1,
    "patience": 0,
    "augment": "light",
    "precision": "fp32",
}


@dataclass(frozen=True)
class Score:
    """One line of the demo's table."""

    name: str
    accuracy: float
    total: int
    seconds: float

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(round(self.accuracy * self.total), self.total)


def write_digits(folder: Path) -> Path:
    """Write the digits as `train/<digit>/*.png` and `test/<digit>/*.png` under `folder` and return it; the test part is a stratified fifth.

    The split is `train_test_split(test_size=0.2, stratify=labels, random_state=0)`. A folder that already holds all pictures is left as it
    is; a new one appears complete or not at all.

    Raises:
        DataError: `folder` holds something else.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        found = sum(1 for _ in folder.glob("t*/[0-9]/*.png"))
        if found == PICTURES:
            return folder
        raise DataError(
            f"Cannot write the demo's digits to {folder}: it is not empty and holds {found} of {PICTURES} pictures. Remove it or name another."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_pictures(unfinished)
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_pictures(folder: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    parts = dict(zip(("train", "test"), train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=0), strict=True))
    for part, members in parts.items():
        for digit in range(10):
            (folder / part / str(digit)).mkdir(parents=True)
        for row in members:
            picture = Image.fromarray(np.round(digits.images[row] * (255 / 16)).astype(np.uint8))
            picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            picture.save(folder / part / str(digits.target[row]) / f"{row:04d}.png")


def frozen_features(model: Any, processor: Any, split: Split, batch_size: int = 64) -> np.ndarray:
    """Return the class token after the final layer norm for every picture, `(len(split), hidden size)`; the model is not changed."""
    import torch

    was_training = model.training
    model.eval()
    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for start in range(0, len(split), batch_size):
            pictures = [split.image(i) for i in range(start, min(start + batch_size, len(split)))]
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(model.device)
            rows.append(model.base_model(pixel_values=pixels).last_hidden_state[:, 0].float().cpu().numpy())
    model.train(was_training)
    return np.concatenate(rows)


def nearest_neighbour_accuracy(train: np.ndarray, train_labels: Sequence[int], test: np.ndarray, test_labels: Sequence[int]) -> float:
    """Return the share of test rows whose most similar training row (by cosine) has their label.

    >>> train = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> nearest_neighbour_accuracy(train, [0, 1], np.array([[2.0, 0.1], [3.0, 0.0]]), [0, 1])
    0.5
    """
    nearest = (_unit_rows(test) @ _unit_rows(train).T).argmax(axis=1)
    return float(np.mean(np.asarray(train_labels)[nearest] == np.asarray(test_labels)))


def _unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def linear_probe_accuracy(train: np.ndarray, train_labels: Sequence[int], test: np.ndarray, test_labels: Sequence[int]) -> float:
    """Return the test accuracy of multinomial logistic regression (L2, C = 1) on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    return float(probe.fit(train, train_labels).score(test, test_labels))


def baseline_scores(model_folder: Path, train: Split, test: Split) -> list[Score]:
    """Measure nearest neighbour and the linear probe on the frozen model's features."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    start = time.perf_counter()
    model = AutoModelForImageClassification.from_pretrained(model_folder)
    processor = AutoImageProcessor.from_pretrained(model_folder)
    features = frozen_features(model, processor, train), train.labels, frozen_features(model, processor, test), test.labels
    extracted = time.perf_counter() - start
    scores = []
    for name, measure in (
        ("nearest neighbour, frozen features", nearest_neighbour_accuracy),
        ("linear probe, frozen features", linear_probe_accuracy),
    ):
        start = time.perf_counter()
        accuracy = measure(*features)
        scores.append(Score(name, accuracy, len(test), extracted + time.perf_counter() - start))
    return scores


def scores_table(scores: Iterable[Score]) -> Any:
    """Lay scores out as a rich table: accuracy, its 95 % interval, seconds."""
    from rich.table import Table

    table = Table("method", title="Held-out digits")
    for heading in ("accuracy", "95 % interval", "seconds"):
        table.add_column(heading, justify="right")
    for score in scores:
        low, high = score.interval
        table.add_row(score.name, f"{score.accuracy:.1%}", f"{low:.1%} – {high:.1%}", f"{score.seconds:.1f}")
    return table


def run_demo(root: str | Path = "veneer-demo", *, seed: int = 0, epochs: float = 18) -> list[Score]:
    """Write the digits under `root`, measure the baselines, train LoRA, reload the adapter from disk and name a few held-out digits.

    Args:
        root: the folder for the digits and the run.
        seed: of the run.
        epochs: passes over the digits; fewer for a quick look.
    """
    from rich.console import Console

    from .data import load_labelled
    from .models import demo_model_path
    from .training import train

    console, root = Console(highlight=False, soft_wrap=True), Path(root)
    data = write_digits(root / "digits")
    console.print(f"{PICTURES:,} scanned digits in {data}; a fifth of them, {data / 'test'}, is held out.")
    names = [str(digit) for digit in range(10)]
    known, held_out = (load_labelled(data / part, names)[0] for part in ("train", "test"))
    scores = baseline_scores(demo_model_path(), known, held_out)
    start = time.perf_counter()
    run = train(data, **SETTINGS | {"seed": seed, "epochs": epochs, "output": root / "runs"})
    found = run.evaluation
    scores.append(Score("LoRA, rank 16 on every linear layer", found.accuracy, found.total, time.perf_counter() - start))
    console.print(scores_table(scores))
    show_reloaded(console, run.directory, [held_out.source(i) for i in range(0, len(held_out), len(held_out) // SHOWN)][:SHOWN])
    return scores


def show_reloaded(console: Any, directory: Path, paths: Sequence[str]) -> None:
    """Load the run from disk alone and print what it takes each picture for."""
    from .prediction import predict

    console.print(f"Reloaded from {directory}:")
    for answer in predict(directory, paths):
        console.print(f"  {answer.path}  {answer.label}  {answer.probability or 0:.1%}")
