"""A small ViT with label names, adapters for it by every method, and what tests of many adapters ask of it."""

from __future__ import annotations

import copy

import torch
from transformers import ViTConfig, ViTForImageClassification

import veneer
from veneer import LoraConfig, PeftModel
from veneer.config import config_classes
from veneer.inject import holders

NAMED = {"id2label": {0: "fir", 1: "oak", 2: "yew"}, "label2id": {"fir": 0, "oak": 1, "yew": 2}}
SMALL = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8, **NAMED)
OPTIONS = {
    "LORA": {"use_dora": True, "init_lora_weights": "olora", "r": 2},
    "ADALORA": {"init_r": 2, "target_r": 1, "total_step": 10},
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "FOURIERFT": {"n_frequency": 8},
    "VERA": {"r": 4},
    "HRA": {"r": 2},
}


def vit() -> ViTForImageClassification:
    torch.manual_seed(3)
    return ViTForImageClassification(copy.deepcopy(SMALL)).eval()


def config(method: str = "LORA", **options) -> veneer.PeftConfig:
    own = OPTIONS.get(method, {"r": 2} if method != "IA3" else {})
    targets = {"target_modules": ["q_proj", "fc1"]} | ({"feedforward_modules": ["fc1"]} if method == "IA3" else {})
    return config_classes()[method](**targets | own | options)


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | options)


def shaken(model: PeftModel, name: str) -> None:
    """Give every number of an adapter another value, so that none is what packing would start from."""
    with torch.no_grad():
        for holder in holders(model.get_base_model()):
            for t in [*holder.veneer[name].parameters(), *holder.veneer[name].buffers()] if name in holder.veneer else ():
                if t.is_floating_point():
                    t.add_(torch.randn_like(t) / 8)


def tensors(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Every tensor of an attached adapter."""
    found = {}
    for path, holder in model.get_base_model().named_modules():
        if hasattr(holder, "veneer_active") and name in holder.veneer:
            part = holder.veneer[name]
            found |= {f"{path}.{n}": t.detach().clone() for n, t in [*part.named_parameters(), *part.named_buffers()]}
    return found


def outputs(model: PeftModel, x: dict, names: str = "abc") -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        model.set_adapter(name)
        found[name] = model(**x).logits.detach()
    return found
