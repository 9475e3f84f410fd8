"""Published parameter counts, at full size and without memory for the weights."""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

from veneer import LoraConfig, get_peft_model


def test_vit_base_with_101_labels(capsys):
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=101))
    config = LoraConfig(
        r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, bias="none", modules_to_save=["classifier"]
    )
    get_peft_model(base, config).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 667,493 || all params: 86,543,818 || trainable%: 0.7713\n"
