"""Trainer pushes a Veneer model: the adapter alone, with a card that says what both know."""

from __future__ import annotations

import json
import re

import pytest
import yaml

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


def test_the_card_of_trainer_says_what_veneer_knows(hub, tmp_path):
    hub.run(tmp_path, "-c", TRAINER, "beside")
    files = hub.repos["someone/trained"]
    assert hub.private["someone/trained"] and {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
    card = files["README.md"].decode()
    fields = yaml.safe_load(card.split("---\n")[1])
    assert "### Training hyperparameters" in card and "made-up words" in card, "Trainer's own words"
    assert card.count("<!-- veneer: end -->") == 1 and "LoRA: W' = W + s·B A" in card and "| trained whole | `classifier` |" in card
    assert fields["base_model"] == "someone/base" and fields["library_name"] == "peft" and fields["pipeline_tag"] == "text-classification"
    assert {"lora", "veneer", "generated_from_trainer", "base_model:adapter:someone/base"} <= set(fields["tags"])

    hub.add("someone/base", tmp_path / "base")
    ours, theirs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    use = "\nimport torch\nwith torch.no_grad(): print(model(input_ids=torch.arange(12).reshape(2, 6)).logits.tolist())\n"
    mine, other = (json.loads(line) for line in hub.run(tmp_path, "-c", ours + use + theirs + use).splitlines())
    assert [len(row) for row in mine] == [3, 3]
    for a, b in zip(mine, other, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_trainer_pushes_checkpoints_where_hf_peft_is_not_installed(hub, tmp_path):
    hub.run(tmp_path, "-c", TRAINER, "alone")
    files = hub.repos["someone/trained"]
    assert "model.safetensors" not in files
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert files[name] == (tmp_path / "here" / name).read_bytes(), "the last step's"
