"""Push to a hub, and load from it, over real HTTP in real processes; what model cards say, and keep."""

from __future__ import annotations

import json
import re

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

TRAINER = """
import sys
if sys.argv[1] == "alone":
    sys.modules["peft"] = None  # as where HF PEFT is not installed
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from veneer import LoraConfig, get_peft_model
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3)
base = BertForSequenceClassification(config)
base.save_pretrained("base")
base.config._name_or_path = base.name_or_path = "someone/base"
model = get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
data = [{"input_ids": torch.randint(50, (6,)), "labels": i % 3} for i in range(12)]
arguments = TrainingArguments("out", max_steps=2, eval_strategy="steps", eval_steps=1, report_to="none", use_cpu=True,
    hub_model_id="someone/trained", hub_private_repo=True, disable_tqdm=True, save_steps=1, push_to_hub=sys.argv[1] == "alone", hub_always_push=True)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
trainer.train()
if sys.argv[1] == "beside":
    trainer.push_to_hub(dataset="made-up words")
else:
    model.save_pretrained("here")
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


def test_the_card_of_trainer_says_what_veneer_knows(hub, run, tmp_path):
    run(TRAINER, "beside")
    files = hub.repos["someone/trained"]
    assert hub.private["someone/trained"] and {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
    card, fields = files["README.md"].decode(), front(files["README.md"])
    assert "### Training hyperparameters" in card and "made-up words" in card, "Trainer's own words"
    assert card.count("<!-- veneer: end -->") == 1 and "LoRA: W' = W + s·B A" in card and "| trained whole | `classifier` |" in card
    assert fields["base_model"] == "someone/base" and fields["library_name"] == "peft" and fields["pipeline_tag"] == "text-classification"
    assert {"lora", "veneer", "generated_from_trainer", "base_model:adapter:someone/base"} <= set(fields["tags"])

    hub.add("someone/base", tmp_path / "base")
    ours, theirs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    use = "\nimport torch\nwith torch.no_grad(): print(model(input_ids=torch.arange(12).reshape(2, 6)).logits.tolist())\n"
    mine, other = (json.loads(line) for line in run(ours + use + theirs + use).splitlines())
    assert [len(row) for row in mine] == [3, 3]
    for a, b in zip(mine, other, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_trainer_pushes_checkpoints_where_hf_peft_is_not_installed(hub, run, tmp_path):
    run(TRAINER, "alone")
    files = hub.repos["someone/trained"]
    assert "model.safetensors" not in files
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert files[name] == (tmp_path / "here" / name).read_bytes(), "the last step's"


def test_a_repository_that_is_not_there(run):
    assert "someone/else is not a directory here, and could not be fetched from the hub" in run(MISSING)
