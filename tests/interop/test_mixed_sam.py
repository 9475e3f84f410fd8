"""A mixed batch of SAM: parts of a fused projection, layers that see windows of a picture, prompts beside the pictures."""

from __future__ import annotations

import torch
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from veneer import LoraConfig, OFTConfig, PeftModel, get_peft_model

NAMES = ["a", "b", "c", "__base__", "a", "c"]


def sam() -> SamModel:
    torch.manual_seed(0)
    vision = SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        output_channels=16,
        global_attn_indexes=[1],
        window_size=4,
        mlp_dim=32,
        num_pos_feats=8,
    )
    decoder = SamMaskDecoderConfig(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16)
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8)
    return SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)).eval()


def masks(model: PeftModel, inputs: dict[str, torch.Tensor], **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, multimask_output=False, **more).pred_masks


def test_every_picture_is_as_alone():
    model = get_peft_model(sam(), LoraConfig(r=2, target_modules=["qkv.q", "qkv.v"], init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=2, use_dora=True, target_modules=["qkv.v"], init_lora_weights=False))
    model.add_adapter("c", OFTConfig(oft_block_size=4, target_modules=["qkv", "lin1"], init_weights=False))
    model.eval()
    inputs = {"pixel_values": torch.randn(6, 3, 64, 64), "input_points": torch.rand(6, 1, 1, 2) * 64}
    together = masks(model, inputs, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        alone = {k: v[i : i + 1] for k, v in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = masks(model, alone)
        else:
            model.set_adapter(name)
            expected = masks(model, alone)
        assert (together[i] - expected[0]).norm() <= 1e-5 * expected.norm()
