"""Push to a hub, and load from it, over real HTTP in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PUSH = """
import torch
from veneer import LoraConfig, get_peft_model
torch.manual_seed(0)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
print(model.push_to_hub("someone/thin", commit_message="first"))
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


def run(script: str, hub, tmp_path) -> str:
    environment = os.environ | hub.environment(str(tmp_path / "home"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_push_and_pull(hub, tmp_path):
    address = run(PUSH, hub, tmp_path)
    assert hub.private == {"someone/thin": True}
    files = hub.repos["someone/thin"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA" and "someone/thin" in address
    assert run(PULL, hub, tmp_path).strip() == "2"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == files[name]


def test_a_repository_that_is_not_there(hub, tmp_path):
    assert "someone/else is not a directory here, and could not be fetched from the hub" in run(MISSING, hub, tmp_path)


def test_info_and_doctor_read_from_the_hub(hub, tmp_path):
    run(PUSH, hub, tmp_path)
    hub.repos["someone/model"] = {
        "config.json": json.dumps({"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}).encode()
    }
    environment = os.environ | hub.environment(str(tmp_path / "home"))
    commands = [["info", "someone/model"], ["doctor", "someone/thin", "--model", "someone/model"]]
    done = [
        subprocess.run([sys.executable, "-m", "veneer", *c], capture_output=True, text=True, env=environment, cwd=tmp_path)
        for c in commands
    ]
    assert [d.returncode for d in done] == [0, 1], [d.stderr[-2000:] for d in done]
    assert "tensors  2, 22 numbers, float32" in done[1].stdout
    assert "someone/model: ViTForImageClassification" in done[0].stdout and "vit.layers.{0..1}.attention.q_proj" in done[0].stdout
    assert "loads    no: target_modules: ['0'] matches vit.layers.0, which is a ViTLayer, a container of layers" in done[1].stdout
