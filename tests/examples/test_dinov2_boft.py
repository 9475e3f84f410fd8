"""The BOFT-on-DINOv2 guide: train, merge, and load what was merged without an adapter library."""

from __future__ import annotations

import json
import re

import torch
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessorPil, Dinov2Config, Dinov2ForImageClassification, Dinov2Model


def test_train_and_merge(hub, run, pictures, tmp_path):
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path / "dino")
    hub.add("facebook/dinov2-large", tmp_path / "dino")
    hub.add("datasets/ethz/food101", pictures)
    said = run("dinov2_boft.py", "--epochs", "3", "--batch-size", "8", "--learning-rate", "1e-2")

    accuracy, predicted = re.search(
        r"^dinov2-boft: accuracy (\S+); validation picture 0 is blue, predicted (\w+)$", said, re.MULTILINE
    ).groups()
    assert float(accuracy) > 0.9 and predicted == "blue"  # of three colours
    assert float(re.search(r"differ from the adapter's by at most (\S+)", said)[1]) < 1e-4
    output = tmp_path / "empty" / "dinov2-boft"
    written = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (written["boft_block_size"], written["boft_n_butterfly_factor"], written["bias"]) == (4, 2, "boft_only")
    trained = int(re.search(r"trainable params: ([\d,]+)", said)[1].replace(",", ""))
    width, hidden, layers = 32, 128, 2
    rotations = 2 * 4 * (5 * width + hidden)  # m blocks of b × b for b features each
    scales_and_biases = 2 * (5 * width + hidden)
    assert trained == layers * (rotations + scales_and_biases) + 3 * (2 * width + 1)

    merged = Dinov2ForImageClassification.from_pretrained(output / "merged").eval()
    processor = AutoImageProcessor.from_pretrained(output / "merged")
    files = sorted((pictures / "validation").rglob("*.png"))
    with torch.no_grad():
        found = merged(**processor([Image.open(f) for f in files], return_tensors="pt")).logits.argmax(-1).tolist()
    right = sum(merged.config.id2label[i] == f.parent.name for i, f in zip(found, files, strict=True))
    assert abs(right / len(files) - float(accuracy)) < 1e-3
