"""Push to a hub, and load from it, over real HTTP in real processes; what model cards say, and keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

PUSH = """
import sys, torch
from veneer import LoraConfig, get_peft_model
torch.manual_seed(0)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
print(model.push_to_hub("someone/thin", **eval(sys.argv[1])))
"""

PULL = """
import torch
from veneer import PeftConfig, PeftModel
print(PeftConfig.from_pretrained("someone/thin").r)
torch.manual_seed(0)
model = PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(6, 5)), "someone/thin")
model.save_pretrained("again")
"""

MISSING = """
import torch
from veneer import AdapterFileError, PeftModel
try:
    PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(6, 5)), "someone/else")
except AdapterFileError as e:
    print(e)
"""

WRONG = """
import torch
from veneer import ConfigError, LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
try:
    model.push_to_hub("someone/thin", metrics={"accuracy": float("nan")})
except ConfigError as e:
    print(e)
"""

CONFIG = """
from veneer import LoHaConfig
LoHaConfig(r=3, target_modules=["0"]).push_to_hub("alone")
"""

TWO = """
import torch
from veneer import LoHaConfig, LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
model.add_adapter("second", LoHaConfig(r=3, target_modules=["0"]))
model.push_to_hub("someone/two", private=False)
"""


@pytest.fixture
def run(hub, tmp_path):
    """Run a script as a process of its own against the hub, and return what it printed."""
    return lambda script, *args: hub.run(tmp_path, "-c", script, *args)


def front(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_push_and_pull(hub, run, tmp_path):
    address = run(PUSH, "{'commit_message': 'first'}")
    assert hub.private == {"someone/thin": True}
    files = hub.repos["someone/thin"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA" and "someone/thin" in address
    assert run(PULL).strip() == "2"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == files[name]


def test_a_second_push_keeps_a_persons_words(hub, run):
    run(PUSH, "{'private': False, 'metrics': {'eval_accuracy': 0.5, 'eval_runtime': 3.0}, 'dataset': 'letters', 'tags': ['thin']}")
    assert hub.private == {"someone/thin": False}
    files = hub.repos["someone/thin"]
    first = files["README.md"].decode()
    assert "| accuracy | 0.5 |" in first and "runtime" not in first
    assert "22 of 57 (38.60 %)" in first and "arXiv:2106.09685" in first and 'from_pretrained(base, "someone/thin")' in first
    assert front(files["README.md"]) == {
        "library_name": "peft", "tags": ["lora", "thin", "veneer"], "datasets": ["letters"], "metrics": ["accuracy"],
    }  # fmt: skip

    files["README.md"] = (
        first.replace("---\n", "---\nlicense: mit\n", 1).replace("# Adapter of a Sequential", "# My adapter\n\nRead me.").encode()
        + b"\nLast words.\n"
    )
    run(PUSH, "{'metrics': {'error': 0.75}}")
    second = files["README.md"].decode()
    assert hub.private == {"someone/thin": False}, "a repository that exists stays as it is"
    assert "# My adapter\n\nRead me." in second and second.endswith("\nLast words.\n") and second.count("## How to use") == 1
    assert "| error | 0.75 |" in second and "accuracy" not in second, "results are those of this adapter"
    assert front(files["README.md"])["license"] == "mit" and front(files["README.md"])["tags"] == ["lora", "thin", "veneer"]


def test_a_branch_and_a_pull_request(hub, run):
    run(PUSH, "{'revision': 'trial'}")
    assert hub.repos["someone/thin"] == {} and "adapter_model.safetensors" in hub.branches["someone/thin", "trial"]
    address = run(PUSH, "{'create_pr': True, 'commit_description': 'why'}")
    assert address.strip().endswith("/someone/thin/discussions/1")
    assert hub.repos["someone/thin"] == {} and "adapter_model.safetensors" in hub.branches["someone/thin", "refs/pr/1"]


def test_nothing_is_sent_when_a_metric_is_wrong(hub, run):
    assert "metrics['accuracy']: a finite number, got nan" in run(WRONG)
    assert hub.repos == {} and hub.requests == []


def test_a_configuration_alone(hub, run):
    run(CONFIG)
    assert set(hub.repos["me/alone"]) == {"adapter_config.json"} and hub.private["me/alone"]
    assert json.loads(hub.repos["me/alone"]["adapter_config.json"])["r"] == 3


def test_every_adapter_has_a_card(hub, run):
    run(TWO)
    files = hub.repos["someone/two"]
    assert {f for f in files if f.endswith(".md")} == {"README.md", "second/README.md"} and not hub.private["someone/two"]
    assert "| method | LoRA: " in files["README.md"].decode()
    second = files["second/README.md"].decode()
    assert "| method | LoHa: " in second and 'from_pretrained(base, "someone/two", subfolder="second")' in second


def test_a_repository_that_is_not_there(run):
    assert "someone/else is not a directory here, and could not be fetched from the hub" in run(MISSING)


def test_info_and_doctor_read_from_the_hub(hub, run, tmp_path):
    run(PUSH, "{}")
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    hub.repos["someone/model"] = {"config.json": json.dumps(config).encode()}
    environment = os.environ | hub.environment(str(tmp_path / "home"))
    commands = [["info", "someone/model"], ["doctor", "someone/thin", "--model", "someone/model"]]
    info, doctor = (
        subprocess.run([sys.executable, "-m", "veneer", *c], capture_output=True, text=True, env=environment, cwd=tmp_path)
        for c in commands
    )
    assert info.returncode == 0, info.stderr[-2000:]
    assert "someone/model: ViTForImageClassification" in info.stdout and "vit.layers.{0..1}.attention.q_proj" in info.stdout
    assert doctor.returncode == 1 and "tensors  2, 22 numbers, float32" in doctor.stdout, doctor.stderr[-2000:]
    assert "loads    no: target_modules: ['0'] matches vit.layers.0, which is a ViTLayer, a container of layers" in doctor.stdout
