"""Adapters of every method as plain LoRA on a real model: HF PEFT reads them with equal outputs, and they keep the rules of vLLM's reader."""

from __future__ import annotations

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import veneer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out is set to False:UserWarning"
)
IDS = torch.arange(1, 9)[None]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def adapted(base, config):
    model = veneer.get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
        return model, model(IDS).logits


TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS = {
    "LoRA": (veneer.LoraConfig(r=3, lora_alpha=7, target_modules=[*TARGETS, "embed_tokens"]), {}),
    "AdaLoRA": (veneer.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=TARGETS), {}),
    "LoHa": (veneer.LoHaConfig(r=2, target_modules=TARGETS), {}),
    "LoKr": (veneer.LoKrConfig(r=2, target_modules=TARGETS), {}),
    "VeRA": (veneer.VeraConfig(r=4, target_modules=["q_proj"]), {}),
    "HRA": (veneer.HRAConfig(r=4, target_modules=TARGETS), {}),
    "DoRA": (veneer.LoraConfig(r=2, use_dora=True, target_modules=TARGETS), {"tolerance": 1e-6}),
    "OFT": (veneer.OFTConfig(oft_block_size=8, target_modules=TARGETS), {"tolerance": 1e-6}),
    "BOFT": (veneer.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=TARGETS), {"tolerance": 1e-6}),
    "(IA)3": (veneer.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]), {"tolerance": 1e-6}),
}


@pytest.mark.parametrize(("config", "how"), METHODS.values(), ids=METHODS)
def test_hf_peft_reads_the_lora_with_equal_outputs(config, how, tmp_path):
    model, y = adapted(llama(), config)
    done = veneer.convert(model, save_directory=tmp_path, **how)
    assert done.error <= 1e-6
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [
    veneer.LoraConfig(r=2, use_dora=True, target_modules=["c_attn.q", "c_attn.v", "c_fc"]),
    veneer.OFTConfig(oft_block_size=4, target_modules=["c_attn.q", "c_attn.v", "c_fc"]),
], ids=["DoRA", "OFT"])  # fmt: skip
def test_parts_of_fused_layers_become_one_lora_of_the_whole(config, tmp_path):
    model, y = adapted(gpt2(), config)
    done = veneer.convert(model, save_directory=tmp_path, tolerance=1e-6)
    assert {path.rpartition(".")[2] for path in done.layers} == {"c_attn", "c_fc"}
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, y, rtol=1e-3, atol=1e-4)


def test_the_file_keeps_the_rules_of_vllms_reader(tmp_path):
    """It takes r as the limit of every layer's rank, one scale for all layers, names as a list, and tensors of `lora_A` and `lora_B` of linear layers."""
    model, _ = adapted(llama(), veneer.LoHaConfig(r=3, target_modules=TARGETS, rank_pattern={"down_proj": 1}))
    for uniform in (False, True):
        done = veneer.convert(model, save_directory=tmp_path / str(uniform), uniform=uniform)
        config = json.loads((tmp_path / str(uniform) / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / str(uniform) / "adapter_model.safetensors")
        assert done.notes == [] and isinstance(config["target_modules"], list)
        assert (config["r"], config["lora_alpha"], config["bias"], config["modules_to_save"], config["use_dora"]) == (
            9,
            9,
            "none",
            None,
            False,
        )
        assert config["rank_pattern"] == config["alpha_pattern"] and bool(config["rank_pattern"]) is not uniform
        assert all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", k) for k in tensors)
        ranks = {t.shape[0] for k, t in tensors.items() if "lora_A" in k}
        assert ranks == ({9} if uniform else {1, 9}) and max(ranks) <= config["r"]
    assert veneer.convert(model, rank=4).rank == 4
    noted, _ = adapted(llama(), veneer.LoraConfig(r=2, target_modules=["embed_tokens"], modules_to_save=["lm_head"]))
    assert len(veneer.convert(noted).notes) == 2


@pytest.mark.parametrize("rank", [3, 0.9])
def test_the_functions_of_the_same_name_give_what_hf_peft_gives(rank, tmp_path):
    from veneer.integrations.peft.conversion import convert_to_lora, save_as_lora

    theirs = peft.get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=TARGETS, init_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "loha")
    model = veneer.PeftModel.from_pretrained(llama(), tmp_path / "loha")
    config, tensors = convert_to_lora(model, rank)
    wanted_config, wanted = peft.convert_to_lora(theirs, rank)
    assert (config.r, config.lora_alpha) == (wanted_config.r, wanted_config.lora_alpha) or not isinstance(rank, int)
    assert {k.removeprefix("base_model.model.") for k in tensors} == {k.removeprefix("base_model.model.") for k in wanted}
    wanted = {k.removeprefix("base_model.model."): t for k, t in wanted.items()}
    for key, A in tensors.items():
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            own = key.removeprefix("base_model.model."), other.removeprefix("base_model.model.")
            assert A.shape == wanted[own[0]].shape
            torch.testing.assert_close(tensors[other] @ A, wanted[own[1]] @ wanted[own[0]], rtol=1e-3, atol=1e-5)
    save_as_lora(tmp_path / "lora", model, rank)
    assert set(load_file(tmp_path / "lora" / "adapter_model.safetensors")) == set(tensors)
    with pytest.raises(veneer.ConfigError, match="share of at most 1"):
        convert_to_lora(model, 1.5)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, (3, 2), stride=2, padding=1)
        self.conv1 = torch.nn.Conv1d(8, 8, 3, padding=1)
        self.emb = torch.nn.Embedding(5, 8)
        self.out = torch.nn.Linear(8, 4)

    def forward(self, x, ids):
        return self.out(self.conv1(self.conv(x).flatten(2)).transpose(1, 2) + self.emb(ids))


@pytest.mark.parametrize("config", [
    veneer.LoHaConfig(r=2, target_modules=["conv", "conv1", "out"]),
    veneer.LoraConfig(r=2, use_dora=True, target_modules=["conv", "conv1", "emb", "out"]),
    veneer.OFTConfig(r=2, oft_block_size=0, target_modules=["conv", "emb", "out"]),
    veneer.IA3Config(target_modules=["conv", "out"]),
    veneer.LoraConfig(r=2, lora_bias=True, target_modules=["conv", "out"]),
], ids=["LoHa", "DoRA", "OFT", "(IA)3, which scales biases", "LoRA with a bias"])  # fmt: skip
def test_convolutions_embeddings_and_biases_as_hf_peft_reads_them(config, tmp_path):
    model = veneer.get_peft_model(Net(), config).eval()
    x, ids = torch.randn(2, 3, 7, 7), torch.randint(0, 5, (2, 1))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        y = model(x, ids)
    veneer.convert(model, save_directory=tmp_path, tolerance=1e-6)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, ids), y, rtol=1e-4, atol=1e-5)
