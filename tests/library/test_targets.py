"""Which layers a configuration names, and what a wrong name is answered with."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from veneer import LoraConfig, TargetError, get_peft_model, plan


@pytest.fixture(scope="module")
def vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8)
    )


def paths(model: nn.Module, **options) -> list[str]:
    return [s.path for s in plan(model, LoraConfig(r=2, **options)).sites]


def test_suffixes_take_whole_names_only():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "my_head": nn.Linear(2, 2)})
    assert paths(model, target_modules=["head"]) == ["head"]


def test_a_string_is_a_regular_expression_for_the_whole_path(vit):
    assert paths(vit, target_modules=r"vit\.layers\.[02]\.mlp\.fc1") == ["vit.layers.0.mlp.fc1", "vit.layers.2.mlp.fc1"]


def test_omitted_targets_are_attention_query_and_value(vit):
    assert paths(vit) == paths(vit, target_modules=["q_proj", "v_proj"])
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32))
    assert paths(llama) == [f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")]


def test_all_linear_leaves_the_head_alone(vit):
    found = paths(vit, target_modules="all-linear")
    assert len(found) == 3 * 6 and "classifier" not in found
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))
    assert len(paths(llama, target_modules="ALL-LINEAR")) == 7


def test_all_linear_reaches_every_linear_of_a_plain_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.Linear(4, 2))
    assert paths(model, target_modules="all-linear") == ["0", "3"]


def test_layer_numbers(vit):
    assert paths(vit, target_modules=["fc1"], layers_to_transform=[0, 2]) == ["vit.layers.0.mlp.fc1", "vit.layers.2.mlp.fc1"]
    assert paths(vit, target_modules=["fc1"], layers_to_transform=1, layers_pattern="layers") == ["vit.layers.1.mlp.fc1"]
    top = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(2)])})
    assert paths(top, target_modules=["q"], layers_to_transform=[1]) == ["layers.1.q"]


def test_exclusions_win(vit):
    assert paths(vit, target_modules=["fc1", "fc2"], exclude_modules=["fc2"]) == [f"vit.layers.{i}.mlp.fc1" for i in range(3)]
    assert paths(vit, target_modules=["fc1"], exclude_modules=r".*\.[01]\..*") == ["vit.layers.2.mlp.fc1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["qproj"]}, "'qproj' matches no layer.* Did you mean \"q_proj\""),
        ({"target_modules": ["q_proj", "nonsense"]}, "'nonsense' matches no layer.*called: projection, q_proj, k_proj"),
        ({"target_modules": r".*\.q"}, "matches no layer"),
        ({"target_modules": ["layernorm_before"]}, "is a LayerNorm; what can be adapted are"),
        ({"target_modules": ["embeddings"]}, "is a ViTEmbeddings, a container of layers"),
        ({"target_modules": ["fc1"], "layers_to_transform": [9]}, r"among layers_to_transform=\[9\]"),
        ({"target_modules": ["fc1"], "modules_to_save": ["clasifier"]}, "no module is called 'clasifier'.* Did you mean \"classifier\""),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"\['q_proj'\] matches no layer"),
    ],
)
def test_errors_name_the_remedy_and_change_nothing(vit, options, message):
    model = copy.deepcopy(vit)
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, LoraConfig(**options))
    assert [type(m) for m in model.modules()] == [type(m) for m in vit.modules()]
    assert all(p is before[n][0] and p.requires_grad == before[n][1] for n, p in model.named_parameters())


def test_the_output_projection_of_multihead_attention_is_adapted_where_it_is_read():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)
    assert paths(model, target_modules="all-linear") == ["self_attn.out_proj", "linear1", "linear2"]
    adapted = get_peft_model(model, LoraConfig(target_modules=["out_proj"], init_lora_weights=False))
    adapted(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    y = adapted.eval()(x)
    torch.testing.assert_close(adapted.merge_and_unload()(x), y)


def test_a_replaced_forward_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].forward = lambda x: x
    with pytest.raises(TargetError, match=r"the forward of this one Linear object was replaced"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


def test_accelerate_hooks_are_kept_and_the_adapter_runs():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    seen = []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    model = nn.Sequential(nn.Linear(4, 4))
    add_hook_to_module(model[0], Count())
    x = torch.randn(2, 4)
    base = model(x)
    peft = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    assert not torch.equal(peft(x), base) and len(seen) == 2
    plain = peft.unload()
    assert torch.equal(plain(x), base) and len(seen) == 3
    remove_hook_from_module(plain[0])
    assert torch.equal(plain(x), base) and len(seen) == 3


def test_the_plan_prints_a_table(vit):
    made = plan(vit, LoraConfig(r=2, target_modules=["fc1", "q_proj"], modules_to_save=["classifier"], bias="lora_only"))
    lines = str(made).splitlines()
    assert lines[0].split() == ["layer", "kind", "storage", "out", "×", "in", "layers", "parameters"]
    assert lines[1].split() == ["vit.layers.{0..2}.attention.q_proj", "linear", "float", "16", "×", "16", "3", str(3 * 64)]
    assert lines[2].split() == ["vit.layers.{0..2}.mlp.fc1", "linear", "float", "24", "×", "16", "3", str(3 * 80)]
    assert lines[3].split() == ["classifier", "whole", "module", "1", "34"]
    assert lines[4].split() == ["total", "7", str(3 * 64 + 3 * 80 + 34)]
    assert lines[5] == "biases trained in place: 6"
    base = sum(p.numel() for p in vit.parameters())
    assert lines[6].startswith(f"frozen: {base - 34:,} parameters of 18 Linear, ") and "7 LayerNorm" in lines[6] and "1 Conv2d" in lines[6]
    assert made.to_dict()["trainable"] == made.trainable and made.to_dict()["layers"][0]["path"] == "vit.layers.0.attention.q_proj"


def test_layers_of_other_shapes_are_on_lines_of_their_own():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 3], num_heads=[1, 2], window_size=4)
    lines = str(
        plan(SwinForImageClassification(config), LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"blocks.2.*": 1}))
    ).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [
        "swin.encoder.layers.0.blocks.{0..1}.attention.q_proj",
        "swin.encoder.layers.1.blocks.{0..1}.attention.q_proj",
        "swin.encoder.layers.1.blocks.2.attention.q_proj",
    ]


def test_a_large_model_prints_a_screenful():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    text = str(plan(model, LoraConfig(target_modules="all-linear")))
    assert len(text.splitlines()) == 10 and "model.layers.{0..31}.mlp.gate_proj" in text and max(map(len, text.splitlines())) <= 160


def test_what_is_newly_initialised_is_said(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    text = str(plan(ViTForImageClassification.from_pretrained(tmp_path), LoraConfig(r=2)))
    assert re.search(r"^classifier +whole module \(newly initialised\) +1 +34$", text, re.MULTILINE)
    assert "newly initialised, and frozen: pooler.dense" in str(plan(ViTModel.from_pretrained(tmp_path), LoraConfig(r=2)))


def test_swin_runs_and_trains():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    model = get_peft_model(SwinForImageClassification(config), LoraConfig(r=2))
    model(pixel_values=torch.randn(1, 3, 32, 32)).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("lora_B"))


def test_a_layer_under_two_names_is_adapted_once():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert paths(model, target_modules=["a"]) == ["a"]
    assert paths(model, target_modules=["a", "b"]) == ["a"]
    assert paths(model, target_modules=["b"]) == ["b"]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_fused_path_of_transformer_encoders_does_not_pass_by_the_adapters(layers):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    base = (nn.TransformerEncoder(layer, layers) if layers > 1 else layer).eval().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = base(x)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)).eval()
        adapted = model(x)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(model(x), adapted)
        assert torch.equal(model.unload()(x), plain)
    assert all(m.activation_relu_or_gelu == 1 for m in base.modules() if isinstance(m, nn.TransformerEncoderLayer))
