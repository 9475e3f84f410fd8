"""The names of older transformers releases, through transformers' own renaming tables, and files that HF PEFT reads."""

from __future__ import annotations

import json
import logging
import sys

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from veneer import LoraConfig, TargetError, get_peft_model, plan
from veneer.oldnames import old_names

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16, "patch_size": 8}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
SEGFORMER = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8}

# model: (class, configuration, {name then: names today})
MODELS = {
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig(**SMALL),
        {
            "query": "q_proj",
            "key": "k_proj",
            "value": "v_proj",
            "output.dense": "o_proj fc2",
            "attention.output.dense": "o_proj",
            "intermediate.dense": "fc1",
            "mlp.fc1": "fc1",
        },
    ),
    "deit": (hf.DeiTForImageClassification, hf.DeiTConfig(**SMALL), {"query": "q_proj", "value": "v_proj", "output.dense": "o_proj fc2"}),
    "beit": (
        hf.BeitForImageClassification,
        hf.BeitConfig(**SMALL),
        {"query": "q_proj", "value": "v_proj", "attention.output.dense": "o_proj", "output.dense": "o_proj fc2"},
    ),
    "dinov2": (
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config(**SMALL),
        {"query": "q_proj", "value": "v_proj", "attention.output.dense": "o_proj", "mlp.fc1": "fc1"},
    ),
    "swin": (
        hf.SwinForImageClassification,
        hf.SwinConfig(**STAGES),
        {"query": "q_proj", "value": "v_proj", "self.key": "k_proj", "output.dense": "o_proj fc2"},
    ),
    "segformer": (
        hf.SegformerForImageClassification,
        hf.SegformerConfig(**SEGFORMER),
        {"query": "q_proj", "value": "v_proj", "attention.output.dense": "o_proj", "mlp.dense1": "fc1"},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    cls, config, names = MODELS[request.param]
    torch.manual_seed(0)
    return cls(config).eval(), names


def test_transformers_own_tables_give_the_names(case):
    """Pins what Veneer uses of transformers' internals."""
    model, _ = case
    (table,) = old_names(model)
    assert any(then.endswith("query") for then in table.values()) and len(set(table.values())) == len(table)
    assert table["classifier"] == "classifier"


def test_a_model_without_renamings_has_no_old_names():
    assert old_names(hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))) == []
    assert old_names(nn.Sequential(nn.Linear(2, 2))) == []


@pytest.mark.parametrize("missing", ["transformers", "transformers.conversion_mapping"])
def test_without_the_tables_there_are_no_old_names(missing, monkeypatch):
    model = hf.ViTForImageClassification(MODELS["vit"][1])
    if missing == "transformers":
        monkeypatch.delitem(sys.modules, missing)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    assert old_names(model) == []
    assert len(plan(model, LoraConfig(target_modules=["q_proj"])).sites) == 2
    with pytest.raises(TargetError, match="'query' matches no layer"):
        plan(model, LoraConfig(target_modules=["query"]))


def test_old_names_mean_the_same_layers(case):
    model, names = case
    for then, today in names.items():
        wanted = [s.path for s in plan(model, LoraConfig(target_modules=today.split())).sites]
        assert [s.path for s in plan(model, LoraConfig(target_modules=[then])).sites] == wanted
        assert [s.path for s in plan(model, LoraConfig(target_modules=rf".*\.{then}")).sites] == wanted


def test_names_of_today_come_first_and_wrong_ones_are_still_errors(case):
    model, _ = case
    assert plan(model, LoraConfig(target_modules=["q_proj"])).rewritten == {}
    with pytest.raises(TargetError, match="'qurey' matches no layer.*Did you mean \"query\""):
        plan(model, LoraConfig(target_modules=["qurey"]))


def test_a_name_of_today_that_meant_more_is_told(caplog):
    model = hf.ViTModel(MODELS["vit"][1])
    with caplog.at_level(logging.WARNING, "veneer"):
        assert [s.path for s in plan(model, LoraConfig(target_modules=["dense"])).sites] == ["pooler.dense"]
        assert "dense is a name of today; in older releases it meant 6 layers more, such as layers.0.attention.o_proj" in caplog.text
        caplog.clear()
        plan(model, LoraConfig(target_modules=["q_proj", "query", "fc1"]))
        assert not caplog.text


def test_an_old_model_inside_a_plain_module():
    model = nn.ModuleDict({"backbone": hf.ViTModel(MODELS["vit"][1]), "top": nn.Linear(16, 2)})
    assert [s.path for s in plan(model, LoraConfig(target_modules=["attention.query"])).sites] == [
        f"backbone.layers.{i}.attention.q_proj" for i in (0, 1)
    ]
    assert {t: p for p, t in old_names(model)[0].items()}[
        "backbone.encoder.layer.1.attention.attention.query"
    ] == "backbone.layers.1.attention.q_proj"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "targets", [["query", "output.dense"], ["attention.query", "mlp"], ["attention"], r".*\.(query|value)", None, "mlp.down"]
)
def test_what_was_meant_is_written_by_todays_names_and_hf_peft_reads_it(targets, tmp_path):
    config = MODELS["vit"][1]
    torch.manual_seed(0)
    model = get_peft_model(hf.ViTForImageClassification(config), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        y = model(pixel_values=x).logits
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert written == model.peft_config["default"].target_modules and all(n.endswith(("_proj", "fc1", "fc2")) for n in written)
    other = hf.ViTForImageClassification(config)
    other.load_state_dict({k: v for k, v in model.get_base_model().state_dict().items() if ".veneer." not in k})
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()(pixel_values=x).logits
    torch.testing.assert_close(theirs, y, rtol=1e-5, atol=1e-6)
