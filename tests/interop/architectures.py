"""Small random models of the architectures with fused projections, and what each is called with."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import transformers as T

SMALL = {"num_hidden_layers": 1, "vocab_size": 16, "hidden_size": 16}
WIDE = SMALL | {"intermediate_size": 16}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 16, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
VIT = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SAM = VIT | {"num_hidden_layers": 2, "output_channels": 8, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 16}
QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
GLM = WIDE | IDS | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def of(package: str, cls: str) -> Any:
    """A class that transformers does not export at its top."""
    kind = "configuration" if cls.endswith("Config") else "modeling"
    return getattr(import_module(f"transformers.models.{package}.{kind}_{package}"), cls)


def text(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.arange(1, 8)[None], **more}


def pixels(height: int, width: int | None = None) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, height, width or height)}


def patches() -> dict[str, Any]:
    return {"hidden_states": torch.randn(16, 3 * 2 * 16), "grid_thw": torch.tensor([[1, 4, 4]])}


def hidden() -> dict[str, Any]:
    return {"hidden_states": torch.randn(1, 5, 16)}


def phi4() -> Any:
    audio = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2}
    vision = VIT | {"intermediate_size": 16, "num_hidden_layers": 1}
    return T.Phi4MultimodalConfig(**WIDE | IDS, num_attention_heads=4, num_key_value_heads=2, audio_config=audio, vision_config=vision)


def falcon(**options: Any) -> Any:
    return T.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=16, **IDS, **options)


def eager(config: Any) -> Any:
    config._attn_implementation = "eager"
    return config


NO_CACHE = {"use_cache": False}
Architecture = tuple[Any, Callable[[], Any], Callable[[], dict[str, Any]]]
ARCHITECTURES: dict[str, Architecture] = {
    "sam": (T.SamVisionModel, lambda: T.SamVisionConfig(**SAM), lambda: pixels(32)),
    "sam, eager": (T.SamVisionModel, lambda: eager(T.SamVisionConfig(**SAM)), lambda: pixels(32)),
    "sam-hq": (T.SamHQVisionModel, lambda: T.SamHQVisionConfig(**SAM), lambda: pixels(32)),
    "sam-hq, eager": (T.SamHQVisionModel, lambda: eager(T.SamHQVisionConfig(**SAM)), lambda: pixels(32)),
    "sam2": (
        T.Sam2HieraDetModel,
        lambda: T.Sam2HieraDetConfig(
            hidden_size=16,
            num_attention_heads=1,
            image_size=[64, 64],
            blocks_per_stage=[1, 2, 2, 2],
            embed_dim_per_stage=[16, 32, 64, 128],
            num_attention_heads_per_stage=[1, 2, 4, 8],
            window_size_per_stage=[4, 2, 2, 2],
            global_attention_blocks=[4],
            window_positional_embedding_background_size=[4, 4],
        ),
        lambda: pixels(64),
    ),
    "hiera": (
        T.HieraModel,
        lambda: T.HieraConfig(
            embed_dim=16,
            image_size=[64, 64],
            depths=[1, 1],
            num_heads=[1, 2],
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, False],
            num_query_pool=1,
        ),
        lambda: pixels(64),
    ),
    "vitdet": (T.VitDetModel, lambda: T.VitDetConfig(**VIT, num_hidden_layers=2, pretrain_image_size=32), lambda: pixels(32)),
    "got-ocr2": (
        of("got_ocr2", "GotOcr2VisionEncoder"),
        lambda: of("got_ocr2", "GotOcr2VisionConfig")(**SAM),
        lambda: pixels(32),
    ),
    "blip": (T.BlipVisionModel, lambda: T.BlipVisionConfig(**VIT, intermediate_size=16, num_hidden_layers=1), lambda: pixels(32)),
    "blip2": (T.Blip2VisionModel, lambda: T.Blip2VisionConfig(**VIT, intermediate_size=16, num_hidden_layers=1), lambda: pixels(32)),
    "instructblip": (
        T.InstructBlipVisionModel,
        lambda: T.InstructBlipVisionConfig(**VIT, intermediate_size=16, num_hidden_layers=1),
        lambda: pixels(32),
    ),
    "seggpt": (
        T.SegGptModel,
        lambda: T.SegGptConfig(
            **VIT | {"image_size": [32, 16]},
            num_hidden_layers=2,
            pretrain_image_size=32,
            intermediate_hidden_state_indices=[1],
            merge_index=0,
            decoder_hidden_size=8,
            mlp_dim=16,
        ),
        lambda: pixels(16) | {"prompt_pixel_values": torch.randn(1, 3, 16, 16), "prompt_masks": torch.randn(1, 3, 16, 16)},
    ),
    "timesformer": (
        T.TimesformerModel,
        lambda: T.TimesformerConfig(**VIT | {"image_size": 16}, num_frames=2, num_hidden_layers=1, intermediate_size=16),
        lambda: {"pixel_values": torch.randn(1, 2, 3, 16, 16)},
    ),
    "mgp-str": (
        T.MgpstrModel,
        lambda: T.MgpstrConfig(**VIT | {"image_size": [16, 32]}, num_hidden_layers=1),
        lambda: pixels(16, 32),
    ),
    "florence2": (
        of("florence2", "Florence2VisionBackbone"),
        lambda: of("florence2", "Florence2VisionConfig")(
            embed_dim=[16, 32],
            num_heads=[2, 2],
            num_groups=[2, 2],
            depths=[1, 1],
            patch_size=[7, 3],
            patch_stride=[4, 2],
            patch_padding=[3, 1],
            patch_prenorm=[False, True],
            window_size=2,
            projection_dim=16,
        ),
        lambda: {"hidden_states": torch.randn(1, 3, 32, 32)},
    ),
    "qwen2-vl": (
        of("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
        lambda: of("qwen2_vl", "Qwen2VLVisionConfig")(**QWEN, embed_dim=16, mlp_ratio=1),
        patches,
    ),
    "qwen2.5-vl": (
        of("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
        lambda: of("qwen2_5_vl", "Qwen2_5_VLVisionConfig")(
            **QWEN, out_hidden_size=16, intermediate_size=16, window_size=16, fullatt_block_indexes=[0]
        ),
        patches,
    ),
    "qwen3-vl": (
        of("qwen3_vl", "Qwen3VLVisionModel"),
        lambda: of("qwen3_vl", "Qwen3VLVisionConfig")(
            **QWEN, out_hidden_size=16, intermediate_size=16, num_position_embeddings=16, deepstack_visual_indexes=[]
        ),
        patches,
    ),
    "glm4v": (
        of("glm4v", "Glm4vVisionModel"),
        lambda: of("glm4v", "Glm4vVisionConfig")(**QWEN, out_hidden_size=16, intermediate_size=16, image_size=16),
        patches,
    ),
    "glm4v, text": (
        of("glm4v", "Glm4vTextMLP"),
        lambda: of("glm4v", "Glm4vTextConfig")(**WIDE, num_attention_heads=2, num_key_value_heads=1),
        hidden,
    ),
    "mpt": (T.MptModel, lambda: T.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=16, max_seq_len=16), lambda: text(**NO_CACHE)),
    "modernbert": (
        T.ModernBertModel,
        lambda: T.ModernBertConfig(**WIDE | IDS, num_attention_heads=2, cls_token_id=1, sep_token_id=2),
        text,
    ),
    "dbrx": (
        T.DbrxModel,
        lambda: T.DbrxConfig(
            d_model=16,
            n_heads=4,
            n_layers=1,
            vocab_size=16,
            max_seq_len=16,
            attn_config={"kv_n_heads": 2, "clip_qkv": 100.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
        ),
        lambda: text(**NO_CACHE),
    ),
    "phi3": (
        T.Phi3Model,
        lambda: T.Phi3Config(**WIDE | IDS, num_attention_heads=4, num_key_value_heads=2),
        lambda: text(**NO_CACHE),
    ),
    "phi4": (T.Phi4MultimodalModel, phi4, lambda: text(**NO_CACHE)),
    "phi4, audio": (of("phi4_multimodal", "Phi4MultimodalAudioMLP"), lambda: phi4().audio_config, hidden),
    "dia": (of("dia", "DiaMLP"), lambda: of("dia", "DiaEncoderConfig")(hidden_size=16, intermediate_size=16), hidden),
    "glm": (T.GlmModel, lambda: T.GlmConfig(**GLM), lambda: text(**NO_CACHE)),
    "glm4": (T.Glm4Model, lambda: T.Glm4Config(**GLM), lambda: text(**NO_CACHE)),
    "codegen": (
        T.CodeGenModel,
        lambda: T.CodeGenConfig(**GPT | {"n_embd": 32, "n_head": 8}, rotary_dim=4, n_ctx=16),
        lambda: text(**NO_CACHE),
    ),
    "gpt2": (T.GPT2Model, lambda: T.GPT2Config(**GPT), lambda: text(**NO_CACHE)),
    "gpt2, cross attention": (
        T.GPT2Model,
        lambda: T.GPT2Config(**GPT, add_cross_attention=True),
        lambda: text(**NO_CACHE, encoder_hidden_states=torch.randn(1, 5, 16)),
    ),
    "imagegpt": (T.ImageGPTModel, lambda: T.ImageGPTConfig(**GPT), lambda: text(**NO_CACHE)),
    "openai": (T.OpenAIGPTModel, lambda: T.OpenAIGPTConfig(**GPT), text),
    "decision transformer": (
        T.DecisionTransformerModel,
        lambda: T.DecisionTransformerConfig(
            hidden_size=16, n_head=2, n_layer=1, state_dim=3, act_dim=2, max_ep_len=16, bos_token_id=0, eos_token_id=0
        ),
        lambda: {
            "states": torch.randn(1, 4, 3),
            "actions": torch.randn(1, 4, 2),
            "rewards": torch.randn(1, 4, 1),
            "returns_to_go": torch.randn(1, 4, 1),
            "timesteps": torch.arange(4)[None],
            "attention_mask": torch.ones(1, 4),
        },
    ),
    "gpt-bigcode": (T.GPTBigCodeModel, lambda: T.GPTBigCodeConfig(**GPT, multi_query=True), lambda: text(**NO_CACHE)),
    "gpt-bigcode, all heads": (T.GPTBigCodeModel, lambda: T.GPTBigCodeConfig(**GPT, multi_query=False), lambda: text(**NO_CACHE)),
    "bloom": (T.BloomModel, lambda: T.BloomConfig(hidden_size=16, n_head=2, n_layer=1, vocab_size=16), lambda: text(**NO_CACHE)),
    "gpt-neox": (T.GPTNeoXModel, lambda: T.GPTNeoXConfig(**WIDE, num_attention_heads=2), lambda: text(**NO_CACHE)),
    "gpt-neox, japanese": (
        T.GPTNeoXJapaneseModel,
        lambda: T.GPTNeoXJapaneseConfig(**SMALL | IDS, num_attention_heads=2),
        lambda: text(**NO_CACHE),
    ),
    "persimmon": (T.PersimmonModel, lambda: T.PersimmonConfig(**WIDE, num_attention_heads=2), lambda: text(**NO_CACHE)),
    "falcon, one key": (T.FalconModel, lambda: falcon(multi_query=True, new_decoder_architecture=False), lambda: text(**NO_CACHE)),
    "falcon, all heads": (
        T.FalconModel,
        lambda: falcon(multi_query=False, new_decoder_architecture=False, alibi=True),
        lambda: text(**NO_CACHE),
    ),
    "falcon, grouped": (T.FalconModel, lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), lambda: text(**NO_CACHE)),
    "deberta": (
        T.DebertaModel,
        lambda: T.DebertaConfig(
            **WIDE, num_attention_heads=2, max_position_embeddings=16, relative_attention=True, pos_att_type=["c2p", "p2c"]
        ),
        text,
    ),
}


def build(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A small random model in eval mode, and an input."""
    cls, config, inputs = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = cls(config()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model, inputs()
