"""A finished run proves itself: a fresh process loads the adapter's folder and must give the same logits, bit for bit.

The fresh process gets pictures, not tensors, so that image processor, label names, base, adapter and head are all read back from disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from .batches import logits
from .data import Split

PICTURES = 64


def prove(model: Any, processor: Any, adapter: Path, split: Split) -> tuple[bool, str]:
    """Whether the adapter's folder gives this very model's logits on up to 64 pictures, and a sentence about it."""
    chosen = range(0, len(split), max(1, len(split) // PICTURES))[:PICTURES]
    pictures = [split.image(i) for i in chosen]
    was_training = model.training
    expected = logits(model.eval(), processor, pictures, PICTURES)
    model.train(was_training)
    device = str(next(model.parameters()).device)
    with tempfile.TemporaryDirectory() as folder:
        for i, picture in enumerate(pictures):
            picture.save(Path(folder) / f"{i:03}.png")
        command = [sys.executable, "-m", "veneer.vision.proof", str(adapter), folder, device, str(torch.get_num_threads())]
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
        if done.returncode != 0:
            return (
                False,
                f"reloading {adapter} in a fresh process failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}",
            )
        found = load_file(Path(folder) / "logits.safetensors")["logits"]
    if found.shape == expected.shape and torch.equal(found, expected):
        return True, f"reloaded in a fresh process: identical logits on {len(pictures)} pictures"
    worst = (
        f"largest difference {float((found - expected).abs().max()):.3g}"
        if found.shape == expected.shape
        else f"shape {tuple(found.shape)}"
    )
    return False, f"the adapter reloaded from {adapter} gives other logits than the trained model ({worst})"


def main(adapter: str, folder: str, device: str, threads: str) -> None:
    """The fresh process: logits of a folder's pictures into `logits.safetensors`."""
    from .prediction import load_classifier

    torch.set_num_threads(int(threads))
    classifier = load_classifier(adapter, device=device)
    pictures = [Image.open(p).convert("RGB") for p in sorted(Path(folder).glob("*.png"))]
    found = logits(classifier.model, classifier.processor, pictures, PICTURES)
    save_file({"logits": found}, Path(folder) / "logits.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
