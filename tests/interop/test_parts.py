"""Parts of fused projections in real models: the layouts that are known are what the models do, and adapters of parts do what they say."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as T
from torch import nn

from veneer import (
    BOFTConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    StateError,
    TargetError,
    check_parts,
    get_peft_model,
    plan,
)
from veneer.layers import fused_weights
from veneer.layers.layouts import _TABLE

sys.path.insert(0, str(Path(__file__).parent))

from architectures import ARCHITECTURES, build  # beside this file

NOT_HERE = ("timm.", "dinov2.", "segment_anything.")
tried: dict[str, set[tuple[str, str]]] = {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layouts_are_what_the_model_does(name):
    model, inputs = build(name)
    probes = check_parts(model, **inputs)
    assert probes and {p.path.rpartition(".")[0] for p in probes} <= {f.path for f in fused_weights(model)}
    tried[name] = {(p.path.split(".")[-2], p.around) for p in probes}


def test_every_layout_of_the_table_was_tried():
    for name in ARCHITECTURES.keys() - tried.keys():  # those that another process of the run has tried
        test_layouts_are_what_the_model_does(name)
    known = {(leaf, cls) for leaf, package, classes, _ in _TABLE if not package.startswith(NOT_HERE) for cls in classes.split()}
    # What a subclass computes its parent's class computes, and one has no model of its own.
    assert known - set().union(*tried.values()) <= {
        ("query_key_value", "FalconFlashAttention2"),
        ("qkv", "InstructBlipVideoAttention"),
    }


@pytest.mark.parametrize("said", [["k", "q", "v"], ["q", "v", "k"], {"groups": 2, "parts": ["q", "k", "v"]}, {"q": 8, "k": 24, "v": 16}])
def test_a_wrong_layout_is_found_out(said):
    model, inputs = build("sam")
    with pytest.raises(TargetError, match=r"qkv\.[qkv] in SamVisionSdpaAttention: .* say where the parts lie with fused_layouts"):
        check_parts(model, fused_layouts={"qkv": said}, **inputs)


def test_checking_changes_nothing():
    model, inputs = build("sam")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv.q"], init_lora_weights=False)).train()
    with torch.no_grad():
        before = model(**inputs)[0]
        check_parts(model, **inputs)
        assert torch.equal(model(**inputs)[0], before)
    assert all(m.training for m in model.modules()) and not any(
        m._forward_hooks for n, m in model.named_modules() if n.endswith("attn.qkv")
    )


def moved_rows(model: nn.Module, path: str, before: torch.Tensor) -> list[int]:
    """The rows of a merged weight, as a matrix, that are not what they were."""
    after = model.get_submodule(path).weight
    axis = 0 if type(model.get_submodule(path)).__name__ == "Conv1D" else 1
    return (after != before).any(axis).nonzero().flatten().tolist()


METHODS = {
    "lora": (LoraConfig, {"r": 2, "init_lora_weights": False}),
    "dora": (LoraConfig, {"r": 2, "use_dora": True, "init_lora_weights": False}),
    "loha": (LoHaConfig, {"r": 2, "init_weights": False}),
    "oft": (OFTConfig, {"oft_block_size": 4, "init_weights": False}),
    "boft": (BOFTConfig, {"boft_block_size": 4, "init_weights": False}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "target", "rows"),
    [
        ("sam", "qkv.v", range(32, 48)),
        ("gpt2", "c_attn.v", range(32, 48)),
        ("phi3", "gate_up_proj.up", range(16, 32)),
        ("phi3", "qkv_proj.k", range(16, 24)),
        ("bloom", "query_key_value.k", [*range(8, 16), *range(32, 40)]),
        ("falcon, grouped", "query_key_value.q", [*range(16), *range(32, 48)]),
        ("codegen", "qkv_proj.v", [24 * core + 8 + j for core in range(4) for j in range(8)]),
    ],
)
def test_a_part_is_adapted_and_merged_alone(method, name, target, rows):
    config, options = METHODS[method]
    base, inputs = build(name)
    keys = list(base.state_dict())
    (path, *_) = [p for p, _ in base.named_modules() if p.endswith(target.rpartition(".")[0])]
    before = base.get_submodule(path).weight.detach().clone()
    with torch.no_grad():
        plain = base(**inputs)[0]
        model = get_peft_model(base, config(target_modules=[target], **options)).eval()
        assert torch.equal(model.get_base_model().get_submodule(path).weight, before)
        y = model(**inputs)[0]
        assert (y - plain).abs().max() > 1e-3
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs)[0], y, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == keys
    assert set(moved_rows(merged, path, before)) <= set(rows)
    assert len(moved_rows(merged, path, before)) > len(list(rows)) // 2


def test_plain_names_mean_parts_where_no_module_has_them(tmp_path):
    model, _ = build("sam")
    assert [s.path for s in plan(model, LoraConfig(target_modules=["q", "v"])).sites] == [
        f"vision_encoder.layers.{i}.attn.qkv.{p}" for i in range(2) for p in ("q", "v")
    ]
    assert [s.path for s in plan(model, LoraConfig(target_modules=r".*\.1\.attn\.qkv\.k")).sites] == ["vision_encoder.layers.1.attn.qkv.k"]
    assert [s.path for s in plan(model, LoraConfig(target_modules=["qkv.q"], layers_to_transform=[0])).sites] == [
        "vision_encoder.layers.0.attn.qkv.q"
    ]
    whole = nn.Sequential(nn.ModuleDict({"q": nn.Linear(16, 16)}), model)
    assert [s.path for s in plan(whole, LoraConfig(target_modules=["q"])).sites] == ["0.q"]
    assert {s.path.rpartition(".")[2] for s in plan(model, LoraConfig()).sites} == {"q", "v"}
    print(plan(model, LoraConfig(target_modules=["qkv.q"])))


def test_what_cannot_be_is_refused_before_anything_is_changed():
    model, _ = build("sam")
    classes = [type(m) for m in model.modules()]
    for options, message in [
        ({"target_modules": ["qkv.u"]}, r"'qkv\.u' matches no layer\..* has no known parts|did you mean|qkv\.q"),
        ({"target_modules": ["lin1.q"]}, r"layers\.0\.mlp\.lin1 has no known parts.*fused_layouts=\{'lin1': \['q', 'k', 'v'\]\}"),
        ({"target_modules": ["qkv", "qkv.q"]}, r"attn\.qkv\.q is a part of .*attn\.qkv, which is adapted whole"),
        ({"target_modules": ["qkv.q"], "fused_layouts": {"nowhere": ["q"]}}, "no layer that can be adapted is called 'nowhere'"),
        ({"target_modules": ["qkv.q"], "fused_layouts": {"qkv": {"q": 5, "k": 6}}}, "has 48 rows, its parts would have q 5 \\+ k 6"),
        ({"target_modules": ["qkv.q"], "fused_layouts": {"qkv": ["a", "b", "c", "d", "e"]}}, "48 rows, which are no 5 equal parts"),
    ]:
        with pytest.raises(TargetError, match=message):
            get_peft_model(model, LoraConfig(**options))
    assert [type(m) for m in model.modules()] == classes


def test_the_whole_and_a_part_of_it_by_two_adapters():
    base, inputs = build("sam")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)).eval()
    model.add_adapter("part", OFTConfig(oft_block_size=4, target_modules=["qkv.v"], init_weights=False))
    with torch.no_grad():
        model.set_adapter(["default", "part"])
        y = model(**inputs)[0]
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(**inputs)[0], y, rtol=1e-4, atol=1e-4)
        model.delete_adapter("default")
        assert not torch.allclose(model(**inputs)[0], y, atol=1e-3)


def test_a_file_of_parts_is_refused_elsewhere_and_loads_here(tmp_path):
    base, inputs = build("sam")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["qkv.q", "lin1"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "parts")
    with torch.no_grad():
        y = model(**inputs)[0]
        again = PeftModel.from_pretrained(build("sam")[0], tmp_path / "parts").eval()
        assert torch.equal(again(**inputs)[0], y)
    with pytest.raises(KeyError, match="PARTS"):
        peft.PeftModel.from_pretrained(build("sam")[0], tmp_path / "parts")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out is set to False:UserWarning")
def test_low_rank_parts_are_an_equal_lora_of_the_whole_for_other_readers(tmp_path):
    for name, targets in [("sam", ["qkv.q", "qkv.v"]), ("bloom", ["query_key_value.v"]), ("gpt2", ["c_attn.v", "c_attn.q"])]:
        base, inputs = build(name)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
        model.save_as_lora(tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == 2 * len(targets)
        with torch.no_grad():
            y = model(**inputs)[0]
            theirs = peft.PeftModel.from_pretrained(build(name)[0], tmp_path / name).eval()
            torch.testing.assert_close(theirs(**inputs)[0], y, rtol=1e-5, atol=1e-5)
    rotated = get_peft_model(build("sam")[0], OFTConfig(oft_block_size=4, target_modules=["qkv.q"], init_weights=False))
    with pytest.raises(StateError, match="no change of low rank"):
        rotated.save_as_lora(tmp_path / "oft")


def test_a_training_step_of_parts_keeps_no_copy_of_the_weight():
    """Split, an adapter on q and v of a fused layer multiplies with no more than the layer itself and its own factors."""
    base, inputs = build("sam")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["qkv.q", "qkv.v"]))
    model(**inputs)[0].sum().backward()
    moved = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(moved) == 2 * 2 * 2 and all("weight__q" in n or "weight__v" in n for n in moved)


def test_sam_trains_on_masks_with_parts():
    config = T.SamConfig(
        vision_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
                       "output_channels": 16, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 16, "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    torch.manual_seed(0)
    base = T.SamModel(config)
    for p in base.parameters():
        nn.init.normal_(p, std=0.3)
    model = get_peft_model(base, LoraConfig(r=4, use_dora=True, target_modules=["qkv.q", "qkv.v"]))
    x, box = torch.randn(1, 3, 32, 32), torch.tensor([[[4.0, 4.0, 20.0, 20.0]]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        out = model(pixel_values=x, input_boxes=box, multimask_output=False)
        loss = nn.functional.binary_cross_entropy_with_logits(out.pred_masks, torch.ones_like(out.pred_masks))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
