"""Adapters written here load in HF PEFT with equal outputs, and the other way round."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from veneer import LoraConfig, PeftModel, get_peft_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

OPTIONS = {
    "plain": {},
    "scaled": {"lora_alpha": 24, "use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"v_proj": 3, r"layers\.1\.attention\.q_proj": 5}, "alpha_pattern": {"v_proj": 2}},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "one-layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": [r"vit.layers.0.attention.q_proj"]},
    "every-linear": {"target_modules": "all-linear"},
    "pattern-target": {"target_modules": r".*attention\.[kv]_proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.3},
}


def vit() -> ViTForImageClassification:
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8, num_labels=5
    )
    return ViTForImageClassification(config).eval()


def arguments(options: dict) -> dict:
    return {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]} | options


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * 0.2)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
class TestBothWays:
    def test_ours_loads_there(self, options, pixels, tmp_path):
        ours = get_peft_model(vit(), LoraConfig(**arguments(options))).eval()
        randomise(ours)
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(vit(), tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(pixel_values=pixels).logits, ours(pixel_values=pixels).logits, rtol=1e-5, atol=1e-5)
            merged = theirs.merge_and_unload(), ours.merge_and_unload()
            torch.testing.assert_close(merged[0].state_dict(), merged[1].state_dict(), rtol=1e-5, atol=1e-5)

    def test_theirs_loads_here(self, options, pixels, tmp_path):
        theirs = peft.get_peft_model(vit(), peft.LoraConfig(**arguments(options))).eval()
        randomise(theirs)
        theirs.save_pretrained(tmp_path)
        ours = PeftModel.from_pretrained(vit(), tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(pixel_values=pixels).logits, theirs(pixel_values=pixels).logits, rtol=1e-5, atol=1e-5)

    def test_equal_counts_and_equal_line(self, options, capsys):
        ours = get_peft_model(vit(), LoraConfig(**arguments(options)))
        theirs = peft.get_peft_model(vit(), peft.LoraConfig(**arguments(options)))
        if options.get("bias") == "all":
            # HF PEFT also marks the bias of the classifier's frozen original, which never runs, as trainable.
            theirs.base_model.model.classifier.original_module.bias.requires_grad_(False)
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
        ours.print_trainable_parameters()
        first = capsys.readouterr().out
        theirs.print_trainable_parameters()
        assert first == capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_default_targets_are_written_out(pixels, tmp_path):
    ours = get_peft_model(vit(), LoraConfig(r=4)).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(vit(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixel_values=pixels).logits, ours(pixel_values=pixels).logits, rtol=1e-5, atol=1e-5)
