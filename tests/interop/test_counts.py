"""Published parameter counts, at full size and without memory for the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, SamConfig, SamModel, ViTConfig, ViTForImageClassification

from veneer import AdaLoraConfig, BOFTConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

VIT = [
    (LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, bias="none", **(t := {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]})), 667_493),
    (LoHaConfig(r=16, alpha=16, module_dropout=0.1, **t), 1_257_317),
    (LoKrConfig(r=16, alpha=16, module_dropout=0.1, **t), 116_069),
    (AdaLoraConfig(r=8, init_r=12, tinit=200, tfinal=1000, deltaT=10, total_step=5000, **t), 520_325),
]  # fmt: skip


@pytest.mark.parametrize(("config", "count"), VIT, ids=lambda v: getattr(v, "peft_type", None))
def test_vit_base_with_101_labels(config, count):
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=101))
    assert get_peft_model(base, config).get_nb_trainable_parameters()[0] == count


def test_the_line_that_guides_print(capsys):
    with torch.device("meta"):
        base = ViTForImageClassification(ViTConfig(num_labels=101))
    get_peft_model(base, VIT[0][0]).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 667,493 || all params: 86,543,818 || trainable%: 0.7713\n"


@pytest.mark.parametrize(("parts", "count", "total"), [(["q", "v"], 608_256, 94_343_728), (["q", "k", "v"], 912_384, 94_647_856)])
def test_sam_with_its_fused_projection_split_in_three(parts, count, total):
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(768, 768), nn.Linear(768, 768), nn.Linear(768, 768)

    with torch.device("meta"):
        base = SamModel(SamConfig())
        for layer in base.vision_encoder.layers:
            layer.attn.qkv = Split()
    config = LoraConfig(r=16, use_dora=True, target_modules=[rf"{p}" for p in parts])
    trainable, everything = get_peft_model(base, config).get_nb_trainable_parameters()
    assert trainable == count
    assert everything == total + 256  # transformers 5 made a buffer of SAM's prompt encoder a parameter


def test_boft_on_dinov2_large_adds_little_to_the_model():
    with torch.device("meta"):
        base = Dinov2Model(Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16))
    own = sum(p.nbytes for p in base.parameters())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    model = get_peft_model(base, BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, bias="boft_only", target_modules=targets))
    attention, up, down = 4 * (2 * 256 * 16 + 1024), 2 * 256 * 16 + 4096, 2 * 1024 * 16 + 1024
    assert model.get_nb_trainable_parameters()[0] == 24 * (attention + up + down + 5 * 1024 + 4096)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert held < 1.01 * own  # no permutation matrices, no dense rotations
