"""What merging reports, what it refuses, and that the model is then as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import veneer
from veneer import ConfigError, IA3Config, LoraConfig, MergeReport, PeftModel, StateError, get_peft_model


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)).to(dtype)


def adapted(dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    model = get_peft_model(net(dtype), LoraConfig(**{"r": 2, "target_modules": ["0", "1"], "init_lora_weights": False} | options)).eval()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["1"], init_lora_weights=False))
    return model


def state(model: PeftModel) -> tuple[list[str], dict[str, tuple[int, torch.Tensor]]]:
    """What a refused merge must leave as it was: what is active, the parameter objects and their numbers."""
    return model.active_adapters, {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}


def unchanged(model: PeftModel, before: tuple[list[str], dict[str, tuple[int, torch.Tensor]]]) -> bool:
    active, parameters = state(model)
    return (
        active == before[0]
        and parameters.keys() == before[1].keys()
        and all(i == before[1][n][0] and torch.equal(p.nan_to_num(7), before[1][n][1].nan_to_num(7)) for n, (i, p) in parameters.items())
    )


def spoil(model: PeftModel, layer: int, adapter: str = "default", value: float = float("nan")) -> None:
    with torch.no_grad():
        model.get_base_model()[layer].lora_B[adapter].weight[0, 0] = value


def test_rounding_is_reported_for_half_precision_and_is_nothing_for_float32():
    exact = adapted().merge_adapter()
    assert [(w.path, w.storage, w.error) for w in exact.weights] == [("0", "float", 0.0), ("1", "float", 0.0)]
    model = adapted(torch.bfloat16)
    W = [m.weight.float().clone() for m in model.get_base_model()]
    report = model.merge_adapter()
    for w, before, layer in zip(report.weights, W, model.get_base_model(), strict=True):
        rounded = layer.weight.float()
        assert w.change == pytest.approx(float((rounded - before).norm()), rel=2e-2)
        assert 0 < w.error < 2**-8 * w.norm and w.norm == pytest.approx(float(rounded.norm()), rel=1e-2)
        assert w.of_change == w.error / w.change and w.of_weight == w.error / w.norm
    head, first, _ = str(report).splitlines()
    assert head.split() == ["layer", "storage", "change", "lost", "of", "the", "change", "of", "the", "weight"]
    assert first.startswith("0      float")


def test_the_report_names_weights_that_are_no_layers():
    base = nn.TransformerEncoderLayer(8, 2, 16)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj_weight.q"], init_lora_weights=False))
    assert [w.path for w in model.merge_adapter().weights] == ["self_attn.in_proj_weight"]


def test_merging_for_good_fills_the_report_that_it_is_given():
    report, x = MergeReport(), torch.randn(3, 8)
    model = adapted()
    expected = copy.deepcopy(model).merge_adapter(["default", "other"])
    y = model.merge_and_unload(adapter_names=["default", "other"], report=report)(x)
    assert report == expected and len(report.weights) == 2 and y.shape == (3, 5)


@pytest.mark.parametrize("option", ["safe", "safe_merge"])
@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_nothing_is_written_where_one_weight_would_not_be_finite(option, way):
    model = adapted()
    spoil(model, 1, "other")
    before = state(model)
    with pytest.raises(StateError, match=r"NaN or infinite numbers into 1; nothing was merged"):
        getattr(model, way)(adapter_names=["default", "other"], **{option: True})
    assert unchanged(model, before)
    model.merge_adapter()  # the adapter that is active has no such numbers


def test_numbers_that_only_rounding_makes_infinite_are_refused():
    model = adapted(torch.float16)
    spoil(model, 1, value=1e6)
    before = state(model)
    with pytest.raises(StateError, match="infinite"):
        model.merge_adapter(safe=True)
    assert unchanged(model, before)


def test_a_bias_that_has_no_place_is_refused_and_the_same_adapters_stay_active():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("shifting", LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True))
    before = state(model)
    with pytest.raises(StateError, match="1 has no bias"):
        model.merge_adapter(["shifting"])
    assert unchanged(model, before)


def test_unknown_names_and_merging_twice_are_refused():
    model, x = adapted(), torch.randn(2, 8)
    before = state(model)
    with pytest.raises(StateError, match='called .othr.; attached are default, other. Did you mean "other"'):
        model.merge_adapter(["othr"])
    assert unchanged(model, before)
    model.merge_adapter()
    merged = state(model)
    with pytest.raises(StateError, match="merged already; call unmerge_adapter"):
        model.merge_adapter(["other"])
    assert unchanged(model, merged)
    y = model(x)
    model.merge_and_unload()
    assert torch.equal(model.get_base_model()(x), y)


def test_a_refused_merge_for_good_leaves_a_merged_model_merged():
    model, x = adapted(), torch.randn(2, 8)
    spoil(model, 1, "other")
    model.merge_adapter()
    y = model(x)
    with pytest.raises(StateError, match="NaN"):
        model.merge_and_unload(adapter_names=["other"], safe=True)
    assert torch.equal(model(x), y) and model.active_adapters == ["default"]
    model.unmerge_adapter()
    assert torch.equal(net()(x), model.unload()(x))


def test_an_error_half_way_takes_back_what_was_written(monkeypatch):
    model = adapted()
    before = state(model)
    pack, calls = veneer.layers.storages.FloatStorage.pack, []

    def failing(self, layer, tensor, value):
        calls.append(tensor)
        if len(calls) == 2:
            raise MemoryError
        return pack(self, layer, tensor, value)

    monkeypatch.setattr(veneer.layers.storages.FloatStorage, "pack", failing)
    with pytest.raises(MemoryError):
        model.merge_adapter(["other", "default"])
    assert unchanged(model, before)


def test_originals_come_back_as_the_very_objects_and_are_let_go():
    model, x = adapted(torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16)
    before, y = state(model), model(x)
    layers = list(model.get_base_model())
    model.merge_adapter(originals_device="cpu")
    assert all(list(m.veneer_merged) == ["weight"] and m.weight is not m.veneer_merged["weight"] for m in layers)
    model.unmerge_adapter()
    assert unchanged(model, before) and torch.equal(model(x), y) and not any(m.veneer_merged for m in layers)


@pytest.mark.parametrize(("device", "message"), [("meta", "holds no numbers"), ("grandma", "cannot hold the original weights")])
def test_a_device_that_cannot_hold_originals_is_refused(device, message):
    model = adapted()
    before = state(model)
    with pytest.raises(ConfigError, match=message):
        model.merge_adapter(["other"], originals_device=device)
    assert unchanged(model, before)


def test_biases_that_a_method_scales_are_kept_and_restored_too():
    model, x = get_peft_model(net(), IA3Config(target_modules=["0"])).eval(), torch.randn(2, 8)
    with torch.no_grad():
        model.get_base_model()[0].ia3_l["default"].uniform_(0.5, 2)
    y, layer = model(x), model.get_base_model()[0]
    own = layer.bias
    model.merge_adapter()
    assert layer.bias is not own
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    assert layer.bias is own and torch.equal(model(x), y)
