"""Small real pictures, a small model, and one finished run that the tests share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw


def draw(folder: Path, per_class: int, seed: int = 0) -> Path:
    """Folders of filled circles, filled squares and lines on dark grounds."""
    rng = random.Random(seed)
    for name, shape in (("circles", "ellipse"), ("lines", "line"), ("squares", "rectangle")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            picture = Image.new("RGB", (48, 40), tuple(rng.randint(0, 90) for _ in range(3)))
            x, y = rng.randint(2, 20), rng.randint(2, 14)
            options = {"width": 4} if shape == "line" else {}
            getattr(ImageDraw.Draw(picture), shape)([x, y, x + 20, y + 20], fill=(250, 200, 100), **options)
            picture.save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Twelve pictures of each of three classes, and a file that is none."""
    folder = draw(tmp_path_factory.mktemp("data") / "shapes", 12)
    (folder / "lines" / "broken.jpg").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A saved backbone without a head, with its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished(shapes, small_model, tmp_path_factory):
    """A finished run on the shapes."""
    from veneer.vision import train

    output = tmp_path_factory.mktemp("runs")
    return train(shapes, model=str(small_model), output=output, epochs=3, batch_size=8, r=4, augment="light", patience=0, quiet=True)
