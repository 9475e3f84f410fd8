"""What holds of every example: it stands alone, is short, answers --help at once, and does nothing on import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2ForImageClassification, SamConfig, SamModel, ViTConfig, ViTForImageClassification

from veneer import BOFTConfig, LoraConfig, plan

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_imports_nothing_heavy_and_explains_itself(path, tmp_path):
    script = f"import runpy, sys; runpy.run_path({str(path)!r}); print({{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "set()" and list(tmp_path.iterdir()) == []
    done = subprocess.run([sys.executable, "-X", "importtime", path, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    options = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', path.read_text(encoding="utf-8")))
    assert options and all(option in done.stdout for option in options)
    assert not re.search(r"\| +(torch|transformers|datasets)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_option_is_read(path):
    text = path.read_text(encoding="utf-8")
    read = {n.attr for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "args"}
    options = {name.replace("-", "_") for name in re.findall(r'add_argument\(\s*"--([a-z-]+)"', text)}
    assert read == options
    assert len(text.splitlines()) <= 120


def test_the_table_names_every_example():
    text = (EXAMPLES[0].parent / "README.md").read_text(encoding="utf-8")
    assert {f"`{p.name}`" for p in EXAMPLES} == set(re.findall(r"`\w+\.py`", text))


GUIDES = {
    "vit": (ViTForImageClassification, ViTConfig(num_labels=101), LoraConfig(r=16), ["query", "value"], ["q_proj", "v_proj"], 2 * 12),
    "sam": (SamModel, SamConfig(), LoraConfig(r=16), ["q", "v"], ["qkv.q", "qkv.v"], 2 * 12),
    "dinov2": (
        Dinov2ForImageClassification,
        Dinov2Config(num_labels=100),
        BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2),
        ["query", "value", "key", "output.dense", "mlp.fc1", "mlp.fc2"],
        ["q_proj", "v_proj", "k_proj", "o_proj", "fc1", "fc2"],
        6 * 12,
    ),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_the_names_that_the_guides_publish_choose_the_same_weights(guide):
    cls, model_config, config, published, here, count = GUIDES[guide]
    with torch.device("meta"):
        model = cls(model_config)
    found = []
    for names in (published, here):
        config.target_modules = names
        found.append([site.path for site in plan(model, config).sites])
    assert found[0] == found[1] and len(found[0]) == count
