"""The image-classification guide from end to end: data and base model from the hub, private push, reload in a new process by both libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

EDGE = 32
METHODS = ["lora", "loha", "lokr", "adalora"]
MODEL = "google/vit-base-patch16-224-in21k"
OPTIONS = ["--batch-size", "16", "--accumulate", "1", "--epochs", "3"]

# Several runs in one process, each as from a terminal: importing takes longer than training here.
SEVERAL = """
import runpy, sys
script, *methods = sys.argv[1].split()
options = sys.argv[2:]
for method in methods:
    sys.argv = [script, "--method", method, "--push-to", f"someone/vit-{method}", "--output", method, *options]
    runpy.run_path(script, run_name="__main__")
"""

PREDICT = """
import json, pathlib, sys, torch
from PIL import Image
from transformers import AutoImageProcessor
blocks, folder = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
processor = AutoImageProcessor.from_pretrained("google/vit-base-patch16-224-in21k")
files = sorted(folder.rglob("*.png"))
inputs = processor([Image.open(f) for f in files], return_tensors="pt")
for block in blocks:
    names = {}
    exec(block, names)
    with torch.no_grad():
        logits = names["model"](**inputs).logits
    found = [names["model"].config.id2label[i] for i in logits.argmax(-1).tolist()]
    right = sum(a == f.parent.name for a, f in zip(found, files))
    print(json.dumps({"library": names["PeftModel"].__module__.partition(".")[0], "accuracy": right / len(files), "logits": logits.tolist()}))
"""


@pytest.fixture
def standing_in(hub, pictures, tmp_path):
    """The guide's base model, small and random, and its data set, under their own names."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=EDGE, patch_size=8)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": EDGE, "width": EDGE}).save_pretrained(tmp_path / "vit")
    hub.add(MODEL, tmp_path / "vit")
    hub.add("datasets/ethz/food101", pictures)


def blocks(card: str) -> list[str]:
    """The card's pieces of code."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_every_tab_of_the_guide(hub, run, pictures, standing_in):
    script = Path(__file__).parents[2] / "examples" / "image_classification.py"
    said = run(SEVERAL, " ".join([str(script), *METHODS]), *OPTIONS)
    code = []
    for method in METHODS:
        files = hub.repos[f"someone/vit-{method}"]
        assert hub.private[f"someone/vit-{method}"]
        assert set(files) - {"schedule.safetensors"} == {"README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json"}
        config = json.loads(files["adapter_config.json"])
        assert (config["peft_type"], config["base_model_name_or_path"]) == (method.upper(), MODEL)
        card = files["README.md"].decode()
        assert f"base_model: {MODEL}" in card and "pipeline_tag: image-classification" in card and "type: ethz/food101" in card
        assert f"someone/vit-{method}: accuracy" in said and "| accuracy |" in card
        code += blocks(card)
    accuracy = [float(a) for a in re.findall(r"someone/vit-\w+: accuracy (\S+); validation picture 0 is blue, predicted blue", said)]
    assert len(accuracy) == 4 and min(accuracy) > 0.9  # of three colours
    assert "trainable params: 4,195 ||" in said and "trainable params: 8,291 ||" in said

    again = [json.loads(line) for line in run(PREDICT, json.dumps(code), str(pictures / "validation")).splitlines()]
    for (ours, theirs), expected in zip(zip(again[::2], again[1::2], strict=True), accuracy, strict=True):
        assert (ours["library"], theirs["library"]) == ("veneer", "peft")
        assert ours["accuracy"] == theirs["accuracy"] == pytest.approx(expected, abs=1e-3)
        for a, b in zip(ours["logits"], theirs["logits"], strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_a_folder_in_place_of_the_hub(run, pictures, standing_in):
    said = run(
        "image_classification.py", "--dataset", str(pictures), "--method", "lokr", "--train-examples", "16", "--output", "here", *OPTIONS
    )
    assert "3 classes, 16 pictures to train, 16 to validate, 3 steps" in said
    assert re.search(r"^here: accuracy \S+; validation picture 0 is \w+, predicted \w+$", said, re.MULTILINE)
