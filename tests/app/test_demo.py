"""The demo's parts: the digits on disk, the measurements, the bundled model and the script that made it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import AutoImageProcessor, AutoModelForImageClassification

import veneer.vision
from veneer.errors import DataError
from veneer.vision import demo
from veneer.vision.data import Split, load_labelled, open_image

MODEL = Path(veneer.vision.__path__[0]) / "demo_model"
SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_demo_model.py"


def part(digits: Path, name: str) -> Split:
    return load_labelled(digits / name, [str(digit) for digit in range(10)])[0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write_digits(tmp_path_factory.mktemp("demo") / "digits")


def test_digits_are_all_there_and_split_as_documented(digits: Path) -> None:
    target = load_digits().target
    rows = dict(zip(("train", "test"), train_test_split(np.arange(1797), test_size=0.2, stratify=target, random_state=0), strict=True))
    for name, members in rows.items():
        paths = list((digits / name).glob("*/*.png"))
        assert {int(path.stem) for path in paths} == set(members.tolist())
        assert all(target[int(path.stem)] == int(path.parent.name) for path in paths)
        assert Counter(int(path.parent.name) for path in paths) == Counter(target[members].tolist())
    assert {open_image(path).size for path in digits.glob("test/0/*.png")} == {(32, 32)}


def test_digits_written_twice_are_the_same_bytes_and_an_existing_folder_is_left_alone(digits: Path, tmp_path: Path) -> None:
    again = demo.write_digits(tmp_path / "again")
    files = sorted(path.relative_to(again) for path in again.rglob("*.png"))
    assert all((again / file).read_bytes() == (digits / file).read_bytes() for file in files)
    before = {file: (again / file).stat().st_mtime_ns for file in files}
    demo.write_digits(again)
    assert {file: (again / file).stat().st_mtime_ns for file in files} == before
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_digits_are_never_mixed_into_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty and holds 0 of 1797"):
        demo.write_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (1, 3), (354, 360), (360, 360), (0, 1)])
def test_wilson_interval_is_scipys(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    assert demo.wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_interval_refuses_what_is_no_proportion(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="0 <= correct <= total"):
        demo.wilson_interval(correct, total)


def test_bundled_model_is_small_complete_and_knows_no_digit() -> None:
    assert (MODEL / "model.safetensors").stat().st_size < 3_000_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = AutoModelForImageClassification.from_pretrained(MODEL, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(MODEL)
    assert not any(report.values()), report
    assert model.num_labels == len(set(model.config.id2label.values())) > 200
    assert not [label for label in model.config.id2label.values() if not label.isalpha() or len(label) != 1]
    pixels = processor(images=[Image.new("RGB", (50, 70))], return_tensors="pt")["pixel_values"]
    assert model(pixel_values=pixels).logits.shape == (1, model.num_labels)


def test_baselines_of_the_bundled_model(digits: Path) -> None:
    torch.set_num_threads(1)
    neighbour, probe = demo.baseline_scores(MODEL, part(digits, "train"), part(digits, "test"))
    assert 0.92 < neighbour.accuracy < 0.98
    assert 0.94 < probe.accuracy < 0.99
    assert neighbour.total == probe.total == 360
    low, high = probe.interval
    assert low < probe.accuracy < high


def test_frozen_features_leave_the_model_as_it_was_and_do_not_depend_on_the_batch(digits: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(MODEL).train()
    processor = AutoImageProcessor.from_pretrained(MODEL)
    few = part(digits, "test").take(range(7))
    one, all_at_once = (demo.frozen_features(model, processor, few, batch_size=n) for n in (1, 7))
    assert one.shape == (7, model.config.hidden_size)
    np.testing.assert_allclose(one, all_at_once, atol=1e-4)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_pretraining_script_makes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "made"), "--steps", "3", "--batch-size", "8", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model, report = AutoModelForImageClassification.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(report.values()), report
    shipped = AutoModelForImageClassification.from_pretrained(MODEL)
    assert model.config.id2label == shipped.config.id2label
    assert "--steps 3" in (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
