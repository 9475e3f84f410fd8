"""`veneer doctor`: what an adapter is, and whether and how it loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

import veneer
from veneer.cli import main

RULES = [("layers", "encoder.layer"), ("attention.q_proj", "attention.attention.query"), ("mlp.fc2", "output.dense")]


@pytest.fixture
def model(tmp_path) -> Path:
    """A saved classifier of two classes."""
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8)
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(model, tmp_path) -> Path:
    """An adapter with a head of three classes."""
    labels = {"id2label": dict(enumerate("abc")), "label2id": {c: i for i, c in enumerate("abc")}}
    base = ViTForImageClassification.from_pretrained(model, ignore_mismatched_sizes=True, **labels)
    adapted = veneer.get_peft_model(base, veneer.LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "fc2"]))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(adapter: Path, key=lambda k: k, tensor=lambda k, t: t, **config) -> None:
    tensors = {key(k): tensor(k, t) for k, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    values = json.loads((adapter / "adapter_config.json").read_text()) | config
    (adapter / "adapter_config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))


def older(key: str) -> str:
    for now, then in RULES:
        key = key.replace(now, then)
    return key


def test_from_the_files_alone(adapter, model, capsys):
    assert main(["doctor", str(adapter)]) == 0
    out = capsys.readouterr().out
    for line in (
        r"method +LORA: lora_alpha=6, r=3, use_rslora$",
        rf"base +{re.escape(str(model))}$",
        r"format +of peft 0\.21\.2$",
        r"targets +fc2, q_proj$",
        r"tensors +10, 483 numbers, float32$",
        r"whole +classifier \(51 numbers\)$",
    ):
        assert re.search("^" + line, out, re.MULTILINE), (line, out)
    assert "loads" not in out and "problem" not in out


def test_on_its_model_with_another_label_set(adapter, model, capsys):
    assert main(["doctor", str(adapter), "--model", str(model)]) == 0
    assert "loads    as it is, on 4 layers of ViTForImageClassification\n" in capsys.readouterr().out


def test_older_names_and_names_inside_are_told(adapter, model, capsys):
    rewrite(
        adapter,
        lambda k: re.sub(r"(lora_[AB])", r"\1.mine", older(k)).removeprefix("base_model.model."),
        target_modules=["query", "layer.0.output.dense", "layer.1.output.dense"],
        peft_version="gone",
        use_dora="gone",
    )
    assert main(["doctor", str(adapter), "--model", str(model), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["loads"] == "by translation" and len(told["renamed"]) == 10
    assert told["renamed"]["vit.encoder.layer.1.output.dense.lora_B.mine.weight"] == "base_model.model.vit.layers.1.mlp.fc2.lora_B.weight"
    assert told["written_for"] is None and told["targets"][0] == "query"
    told = "\n".join(told["spelling"])
    assert "1 fields of the configuration are missing and take their defaults, such as use_dora" in told
    assert "keys hold an adapter's name: mine" in told and "no base_model.model. in front" in told


def test_a_model_in_hand_is_left_as_it_was(adapter, model):
    base = ViTForImageClassification.from_pretrained(model, num_labels=3, ignore_mismatched_sizes=True)
    before = {k: t.clone() for k, t in base.state_dict().items()}
    found = veneer.diagnose(adapter, base)
    assert found.ok and found.loads == "as it is" and found.layers == 4 and found.reason is None
    assert base.state_dict().keys() == before.keys() and all(torch.equal(t, before[k]) for k, t in base.state_dict().items())
    fewer = ViTForImageClassification.from_pretrained(model)  # of two classes; the head is the adapter's own
    assert veneer.diagnose(adapter, fewer).loads == "as it is" and fewer.num_labels == 2
    wrong = ViTForImageClassification(ViTConfig(**base.config.to_dict() | {"intermediate_size": 20}))
    found = veneer.diagnose(adapter, wrong)
    assert not found.ok and "lora_A.weight has shape (3, 24), the model needs (3, 20)" in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: rewrite(a, tensor=lambda k, t: t * torch.nan if "fc2.lora_A" in k else t), r"problem +2 tensors hold NaN or infinite numbers, such as .*fc2"),
        (lambda a: rewrite(a, use_bdlora={"a": 1}), r"problem .*use_bdlora=.* is not supported for LORA \(this variant"),
        (lambda a: rewrite(a, peft_type="gone"), r"problem .*has no peft_type"),
        (lambda a: rewrite(a, peft_type="LURA"), r"problem .*'LURA' is not one of .*Did you mean \"LORA\""),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), r"problem .*a pickle can run code.*python -c"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x" * 40), r"problem .*is damaged"),
        (lambda a: rewrite(a, lambda k: k.replace("lora_A", "lora_A.one").replace("lora_B", "lora_B.two")), r"problem +the file holds 2 adapters, one, two"),
    ],
)  # fmt: skip
def test_problems_are_named_and_the_exit_code_says_so(change, message, adapter, model, capsys):
    change(adapter)
    assert main(["doctor", str(adapter)]) == 1
    assert re.search("^" + message, capsys.readouterr().out, re.MULTILINE | re.IGNORECASE)
    assert main(["doctor", str(adapter), "--model", str(model)]) == 1
    assert re.search(r"^loads +no: ", capsys.readouterr().out, re.MULTILINE)


def test_another_model_is_said_and_why(adapter, capsys):
    assert main(["doctor", str(adapter), "--model", "demo"]) == 1
    assert re.search(r"^loads +no: .* does not fit this model: tensors 16 missing", capsys.readouterr().out, re.MULTILINE)


def test_a_wrapped_models_dump_is_told(adapter, model, capsys):
    extra = {"base_model.model.vit.layernorm.weight": torch.ones(16), "base_model.model.classifier.original_module.bias": torch.zeros(2)}
    save_file(load_file(adapter / "adapter_model.safetensors") | extra, adapter / "adapter_model.safetensors")
    assert main(["doctor", str(adapter), "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "2 tensors are not the adapter's, but copies or the base model's own, and are left out" in out and "original_module" in out


def test_what_is_no_adapter_at_all(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 1
    assert "has no adapter_config.json" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{")
    assert main(["doctor", str(tmp_path)]) == 1
    assert "is not JSON" in capsys.readouterr().err


def test_a_real_run(finished, small_model, capsys):
    assert main(["doctor", str(finished.adapter), "--model", str(small_model)]) == 0
    out = capsys.readouterr().out
    assert "on 4 layers of ViTForImageClassification" in out and "whole    classifier" in out
