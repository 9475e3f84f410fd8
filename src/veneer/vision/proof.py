"""A finished run proves itself: a fresh process loads the adapter's folder and must give the same logits, bit for bit.

The fresh process opens the pictures itself and preprocesses them, so that image processor, label names, base, adapter and head are all read back from disk.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .batches import split_logits
from .data import Split

PICTURES = 64
# A process of torchrun's would otherwise wait for its fellows.
_DISTRIBUTED = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def prove(model: Any, processor: Any, adapter: Path, split: Split) -> tuple[bool, str]:
    """Whether the adapter's folder gives this very model's logits on up to 64 pictures, and a sentence about it."""
    chosen = split.take(range(0, len(split), max(1, len(split) // PICTURES))[:PICTURES])
    was_training = model.training
    expected = split_logits(model.eval(), processor, chosen, PICTURES)
    model.train(was_training)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits.safetensors"
        device = str(next(model.parameters()).device)
        command = [sys.executable, "-m", "veneer.vision.proof", str(adapter), str(file), device, str(torch.get_num_threads())]
        alone = {k: v for k, v in os.environ.items() if k not in _DISTRIBUTED}
        done = subprocess.run(command, input=pickle.dumps(chosen), capture_output=True, env=alone, check=False)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            return False, f"reloading {adapter} in a fresh process failed: {said[-1]}"
        found = load_file(file)["logits"]
    if found.shape == expected.shape and torch.equal(found, expected):
        return True, f"reloaded in a fresh process: identical logits on {len(chosen)} pictures"
    same = found.shape == expected.shape
    worst = f"largest difference {float((found - expected).abs().max()):.3g}" if same else f"shape {tuple(found.shape)}"
    return False, f"the adapter reloaded from {adapter} gives other logits than the trained model ({worst})"


def main(adapter: str, file: str, device: str, threads: str) -> None:
    """The fresh process: logits of the split on stdin, which its own parent sent, into `file`."""
    from .prediction import load_classifier

    torch.set_num_threads(int(threads))
    split: Split = pickle.load(sys.stdin.buffer)
    classifier = load_classifier(adapter, device=device)
    save_file({"logits": split_logits(classifier.model, classifier.processor, split, PICTURES)}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
