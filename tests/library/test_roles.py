"""Roles of layers, told by structure: the same words on every architecture."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as hf
from torch import nn

from veneer import IA3Config, LoraConfig, TargetError, get_peft_model, plan
from veneer.heads import head_modules
from veneer.layers import fused_weights
from veneer.roles import WORDS, query_and_value, roles, with_role

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = SMALL | {"vocab_size": 32}
GQA = TEXT | {"num_key_value_heads": 1, "pad_token_id": 0}
BARE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
BART = {"d_model": 16, "vocab_size": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}  # fmt: skip

# model: (class, configuration, {role: names of the layers without numbers})
MODELS = {
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig(**SMALL),
        {"attention.query": "attention.q_proj", "attention.output": "attention.o_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    ),
    "bert": (
        hf.BertForSequenceClassification,
        hf.BertConfig(**TEXT),
        {
            "attention.query": "self.query",
            "attention.value": "self.value",
            "attention.output": "attention.output.dense",
            "mlp.up": "intermediate.dense",
            "mlp.down": "layer.output.dense",
        },
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5),
        {
            "attention.query": "SelfAttention.q EncDecAttention.q",
            "attention.output": "SelfAttention.o EncDecAttention.o",
            "mlp.up": "DenseReluDense.wi",
            "mlp.down": "DenseReluDense.wo",
        },
    ),
    "t5-gated": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**T5, feed_forward_proj="gated-gelu"),
        {"mlp.gate": "DenseReluDense.wi_0", "mlp.up": "DenseReluDense.wi_1", "mlp.down": "DenseReluDense.wo"},
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32),
        {"attention": "attn.c_attn attn.c_proj", "attention.output": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    ),
    "llama": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**GQA),
        {
            "attention.key": "self_attn.k_proj",
            "attention.output": "self_attn.o_proj",
            "mlp.gate": "mlp.gate_proj",
            "mlp.up": "mlp.up_proj",
            "mlp.down": "mlp.down_proj",
        },
    ),
    "clip": (
        hf.CLIPVisionModel,
        hf.CLIPVisionConfig(**SMALL, projection_dim=8),
        {"attention.query": "self_attn.q_proj", "attention.output": "self_attn.out_proj", "mlp.up": "mlp.fc1"},
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        hf.BartConfig(**BART),
        {"attention.value": "self_attn.v_proj encoder_attn.v_proj", "mlp.up": "layers.fc1", "mlp.down": "layers.fc2"},
    ),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=32),
        {"attention.query": "attention.q_lin", "attention.output": "attention.out_lin", "mlp.down": "ffn.lin2"},
    ),
    "gpt-neox": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**TEXT),
        {"attention": "attention.query_key_value attention.dense", "mlp.up": "mlp.dense_h_to_4h"},
    ),
    "phi3": (
        hf.Phi3ForCausalLM,
        hf.Phi3Config(**GQA),
        {"attention": "self_attn.o_proj self_attn.qkv_proj", "mlp": "mlp.gate_up_proj mlp.down_proj"},
    ),
    "modernbert": (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(**TEXT | {"pad_token_id": 0}),
        {"attention": "attn.Wqkv attn.Wo", "mlp": "mlp.Wi mlp.Wo"},
    ),
    "falcon": (hf.FalconForCausalLM, hf.FalconConfig(**BARE), {"attention.output": "self_attention.dense"}),
    "segformer": (
        hf.SegformerForImageClassification,
        hf.SegformerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]),
        {"attention.query": "attention.q_proj", "mlp.up": "mlp.fc1"},
    ),
    "convnext": (
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig(hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1]),
        {"mlp.up": "layers.pwconv1", "mlp.down": "layers.pwconv2"},
    ),
}


def endings(paths: list[str]) -> set[str]:
    return {re.sub(r"\.\d+(?=\.|$)", "", p) for p in paths}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    cls, config, wanted = MODELS[request.param]
    with torch.device("meta"):
        model = cls(config)
    return model, roles(dict(model.named_modules()), head_modules(model)), wanted


def test_roles_of_real_architectures(case):
    _, known, wanted = case
    for role, names in wanted.items():
        found = endings(with_role(role, known))
        assert found and all(any(("." + f).endswith("." + n) for n in names.split()) for f in found), (role, found)
        assert all(any(("." + f).endswith("." + n) for f in found) for n in names.split()), (role, found)


def test_every_layer_of_a_block_has_a_role_and_heads_have_none(case):
    model, known, _ = case
    without = {s.path for s in plan(model, LoraConfig(target_modules="all-linear")).sites} - {r.path for r in known}
    assert endings(list(without)) <= {"bert.pooler.dense"}
    heads = head_modules(model)
    assert not [r.path for r in known if r.path in heads]
    assert {r.role for r in known} <= set(WORDS)


def test_a_role_word_adapts_what_it_means_and_writes_it_by_name(case):
    model, known, wanted = case
    for role in wanted:
        made = plan(model, LoraConfig(target_modules=[role]))
        assert [s.path for s in made.sites] == with_role(role, known)
        written = made.rewritten["target_modules"]
        again = plan(model, LoraConfig(target_modules=written), fresh=False)
        assert [s.path for s in again.sites] == [s.path for s in made.sites] and "target_modules" not in again.rewritten


def with_parts(model):
    """Roles as a plan sees them: those of the parts of fused layers too."""
    parts = {f"{f.path}.{name}": f.module for f in fused_weights(model) for name in f.layout.parts}
    return roles(dict(model.named_modules()), head_modules(model), parts)


def test_the_default_is_query_and_value_of_layers_and_of_parts(case):
    model, _, _ = case
    known = with_parts(model)
    if not with_role("attention", known):
        with pytest.raises(TargetError, match="no attention was found by its structure, so target_modules is needed"):
            plan(model, LoraConfig())
        return
    found = [s.path for s in plan(model, LoraConfig()).sites]
    separate = with_role("attention.query", known) + with_role("attention.value", known)
    assert sorted(found) == sorted(query_and_value(known)) == sorted(separate) != []
    named = [s.path for s in plan(model, LoraConfig(target_modules=["attention.query", "attention.value"])).sites]
    assert sorted(named) == sorted(found)


def test_a_layer_that_is_meant_itself_stands_for_what_is_inside():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    made = plan(model, LoraConfig(target_modules=["attention"]))
    assert [s.weight for s in made.sites] == ["attention.in_proj_weight", "attention.out_proj.weight"]


def test_the_default_of_a_fused_layer_without_known_parts_is_the_layer():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    model = nn.ModuleList([Attention(), Attention()])
    assert [s.path for s in plan(model, LoraConfig()).sites] == ["0.qkv", "1.qkv"]
    with pytest.raises(TargetError, match=r"only inside fused layers \(0.qkv is query, key, value in one\); name 'attention'"):
        get_peft_model(model, LoraConfig(target_modules=["attention.query"]))
    said = LoraConfig(target_modules=["attention.query"], fused_layouts={"qkv": ["q", "k", "v"]})
    assert [s.path for s in plan(model, said).sites] == ["0.qkv.q", "1.qkv.q"]


def test_roles_of_plain_modules():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    known = roles(dict(layer.named_modules()), [])
    assert with_role("attention", known) == ["self_attn"] and with_role("attention.output", known) == ["self_attn.out_proj"]
    assert with_role("mlp.in", known) == ["linear1"] and with_role("mlp.out", known) == ["linear2"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("to_q", "to_k", "to_v", "to_out", "widen", "narrow", "aside"):
                out, in_ = {"widen": (32, 8), "narrow": (8, 32), "aside": (5, 8)}.get(name, (8, 8))
                setattr(self, name, nn.Linear(in_, out))

    model = nn.ModuleList([Block(), Block()])
    known = roles(dict(model.named_modules()), [])
    assert with_role("attention", known) == [f"{i}.{n}" for i in (0, 1) for n in ("to_q", "to_k", "to_v", "to_out")]
    assert with_role("mlp", known) == [f"{i}.{n}" for i in (0, 1) for n in ("widen", "narrow")]


def test_patterns_and_parts_of_targets_know_roles_too(tmp_path):
    vit = hf.ViTForImageClassification(MODELS["vit"][1])
    model = get_peft_model(vit, LoraConfig(r=4, target_modules=["attention.query", "mlp.down"], rank_pattern={"mlp.down": 2}))
    ranks = {n.partition(".veneer")[0].rpartition(".")[2]: p.shape[0] for n, p in model.named_parameters() if n.endswith("lora_A")}
    assert ranks == {"q_proj": 4, "fc2": 2}
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).rank_pattern == {rf"^vit\.layers\.{i}\.mlp\.fc2": 2 for i in (0, 1)}
    with pytest.raises(TargetError, match="rank_pattern: 'fc1' matches none of the adapted layers"):
        plan(hf.ViTForImageClassification(MODELS["vit"][1]), LoraConfig(target_modules=["fc2"], rank_pattern={"fc1": 2}))
    plain = hf.ViTForImageClassification(MODELS["vit"][1])
    config = IA3Config(target_modules=["attention.key", "attention.value", "mlp.down"], feedforward_modules=["mlp.down"])
    get_peft_model(plain, config)
    assert config.target_modules == ["fc2", "k_proj", "v_proj"] and config.feedforward_modules == ["fc2"]
    sizes = {n.partition(".veneer")[0].rpartition(".")[2]: p.numel() for n, p in plain.named_parameters() if ".veneer." in n}
    assert sizes == {"k_proj": 16, "v_proj": 16, "fc2": 24}


def test_exclusions_know_roles():
    vit = hf.ViTForImageClassification(MODELS["vit"][1])
    made = plan(vit, LoraConfig(target_modules="all-linear", exclude_modules=["mlp"]))
    assert endings([s.path for s in made.sites]) == {f"vit.layers.attention.{n}_proj" for n in "qkvo"}
    assert made.rewritten == {"target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"], "exclude_modules": None}


def test_fused_layers_that_a_role_leaves_out_are_told(caplog):
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    model = nn.ModuleDict({"one": Fused(), "two": Separate()})
    assert [s.path for s in plan(model, LoraConfig(target_modules=["attention.query"])).sites] == ["two.q"]
    assert "attention.query leaves out 1 fused layers that hold it with others, such as one.qkv" in caplog.text
    assert [s.path for s in plan(model, LoraConfig()).sites] == ["one.qkv", "two.q", "two.v"]
