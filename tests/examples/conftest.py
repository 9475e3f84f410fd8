"""What the examples meet offline: their models under their own names on a hub on loopback, made small and random, and a data set of drawn pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from stand_in_hub import Hub

EXAMPLES = Path(__file__).parents[2] / "examples"
COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}

Run = Callable[..., str]


def draw(directory: Path, per_class: int, generator: torch.Generator) -> None:
    """Noisy pictures of one colour each, in a folder per colour."""
    for name, colour in COLOURS.items():
        (directory / name).mkdir(parents=True)
        for i in range(per_class):
            noise = torch.randint(-60, 60, (40, 48, 3), generator=generator)
            picture = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(picture.numpy()).save(directory / name / f"{i}.png")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A data set as a folder: train/ and validation/ with a folder per colour."""
    generator = torch.Generator().manual_seed(0)
    draw(tmp_path / "pictures" / "train", 32, generator)
    draw(tmp_path / "pictures" / "validation", 8, generator)
    return tmp_path / "pictures"


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """Run an example, or code, as a process of its own in an empty folder against the hub, and return what it printed."""
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(script: str, *args: str) -> str:
        return hub.run(folder, *([str(EXAMPLES / script)] if script.endswith(".py") else ["-c", script]), *args)

    return run
