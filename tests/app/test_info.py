"""`veneer info`: the plan and the words for a model that is never loaded."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoConfig, BertConfig, LlamaConfig

import veneer
from veneer.cli import main
from veneer.integrations.skeletons import skeleton


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The configuration of a model of seven billion parameters, and nothing else."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def test_a_large_model_needs_no_weights_and_prints_a_screenful(llama, capsys):
    assert main(["info", str(llama), "--target-modules", "all-linear", "--r", "16"]) == 0
    out = capsys.readouterr().out
    assert f"{llama}: LlamaForCausalLM, 6,738,415,616 parameters" in out and "LoRA, 0.59% trainable" in out
    assert re.search(r"model\.layers\.\{0\.\.31\}\.mlp\.down_proj +linear +float +4096 × 11008 +32 +7,733,248", out)
    assert re.search(r"total +224 +39,976,960", out) and "mlp.gate" in out and len(out.splitlines()) < 40


def test_json_holds_what_the_library_says(small_model, capsys):
    assert main(["info", str(small_model), "--method", "loha", "--target-modules", "query,mlp", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    model = skeleton(str(small_model))
    assert all(p.is_meta for p in model.parameters()) and told["class"] == "ViTModel"
    made = veneer.plan(model, veneer.LoHaConfig(target_modules=["query", "mlp"]))
    assert told["trainable"] == made.trainable and [r["path"] for r in told["layers"]] == [s.path for s in made.sites]
    names = veneer.target_names(model)
    assert told["roles"] == names.roles and told["older_names"] == names.older
    assert names.older == {
        "query": ["q_proj"],
        "key": ["k_proj"],
        "value": ["v_proj"],
        "attention.output.dense": ["o_proj"],
        "intermediate.dense": ["fc1"],
        "output.dense": ["o_proj", "fc2"],
    }
    assert names.names["fc1"] == 2 and names.roles["mlp.down"] == ["layers.0.mlp.fc2", "layers.1.mlp.fc2"]


def test_the_bundled_model_and_the_default(capsys):
    assert main(["info", "demo"]) == 0
    out = capsys.readouterr().out
    assert (
        "vit.layers.{0..5}.attention.q_proj" in out and "vit.layers.{0..5}.attention.v_proj" in out and "older names: query (q_proj)" in out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-modules", "nonsense"], "'nonsense' matches no layer.*Role words here: attention, attention.query"),
        (["--target-modules", "qury"], 'Did you mean "query"'),
        (["--method", "lara"], "'lara' is not one of"),
        (["--target-modules", "layernorm_before"], "is a LayerNorm; what can be adapted are"),
        (["--epochs", "3"], "info has no argument --epochs"),
    ],
)
def test_errors_are_a_sentence(arguments, message, small_model, capsys):
    assert main(["info", str(small_model), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(message, err)


def test_what_is_no_model_is_said(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    assert main(["info", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_configuration_without_a_class_is_read_as_what_it_can_be(tmp_path):
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=32).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures is None
    assert type(skeleton(str(tmp_path))).__name__ == "BertForSequenceClassification"


def test_an_adapter_is_told_apart(finished, capsys):
    assert main(["info", str(finished.adapter)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("adapter ") and "effective rank" in out and torch.is_grad_enabled()
