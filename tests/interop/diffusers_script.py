"""Run by test_diffusers with HF PEFT and with Veneer: every LoRA feature of a tiny pipeline, from the same files and seeds."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

out, name = Path(sys.argv[1]), sys.argv[2]
UNET = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 16, "norm_num_groups": 2, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 8], "latent_channels": 4, "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 16,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    parts = {"unet": UNet2DConditionModel(**UNET), "vae": AutoencoderKL(**VAE), "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT))}
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = StableDiffusionPipeline(
        **parts, tokenizer=None, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: StableDiffusionPipeline, **options) -> torch.Tensor:
    text = pipe.text_encoder(torch.arange(16)[None])[0]
    options |= {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe(prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), **options).images


def filled(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in sorted(tensors.items())}


def write(directory: Path, r: int, seed: int) -> None:
    """A file as a training script writes it: adapters added to the parts, their tensors gathered, saved with their configurations."""
    pipe = pipeline()
    pipe.unet.add_adapter(LoraConfig(r=r, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"]), "x")
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]), "x")
    StableDiffusionPipeline.save_lora_weights(
        directory,
        unet_lora_layers=filled(get_peft_model_state_dict(pipe.unet, adapter_name="x"), seed),
        text_encoder_lora_layers=filled(get_peft_model_state_dict(pipe.text_encoder, adapter_name="x"), seed + 1),
        unet_lora_adapter_metadata=pipe.unet.peft_config["x"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["x"].to_dict(),
    )


write(out / name / "one", 2, 0)
write(out / name / "two", 3, 7)
pipe, seen = pipeline(), {}
seen["frozen"] = image(pipe)
pipe.load_lora_weights(out / name / "one", adapter_name="one")
seen["loaded"] = image(pipe)
seen["scaled in the call"] = image(pipe, cross_attention_kwargs={"scale": 0.4})
seen["scale is put back"] = image(pipe)
pipe.load_lora_weights(out / name / "two", adapter_name="two")
seen["second is active"] = image(pipe)
names = [pipe.get_active_adapters(), pipe.get_list_adapters()]
pipe.set_adapters(["one", "two"], [0.7, 0.2])
seen["weighted sum"] = image(pipe)
pipe.disable_lora()
seen["disabled"] = image(pipe)
pipe.enable_lora()
seen["enabled"] = image(pipe)
pipe.fuse_lora(lora_scale=0.5)
seen["fused"] = image(pipe)
pipe.unfuse_lora()
seen["unfused"] = image(pipe)
pipe.set_adapters("one")
pipe.delete_adapters("two")
seen["second is deleted"] = image(pipe)
pipe.unet.save_lora_adapter(out / name / "unet", adapter_name="one")
pipe.unload_lora_weights()
seen["unloaded"] = image(pipe)
clean = sorted(pipe.unet.state_dict()) == sorted(pipeline().unet.state_dict())
pipe.load_lora_weights(out / name / "two")
seen["loaded after unloading"] = image(pipe)
names.append(pipe.get_active_adapters())
pipe.fuse_lora()
pipe.unload_lora_weights()
seen["fused and unloaded"] = image(pipe)
for writer in ("hf", "veneer"):
    if (out / writer / "unet").is_dir():
        pipe.unet.load_lora_adapter(out / writer / "unet", prefix=None, adapter_name="again", use_safetensors=True)
        seen[f"written by {writer}"] = image(pipe)
        pipe.unet.delete_adapters("again")
torch.save({"images": seen, "names": names, "clean": clean}, out / f"{name}.pt")
