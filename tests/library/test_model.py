"""`PeftModel`: heads, switching, several adapters, merging on awkward models, what is refused."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from veneer import ConfigError, LoraConfig, PeftModel, StateError, TaskType, get_peft_model

CONFIG = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16, "patch_size": 8}


def sequential() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": False} | options)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 6)


class TestHeads:
    @pytest.fixture
    def backbone(self, tmp_path):
        ViTModel(ViTConfig(**CONFIG), add_pooling_layer=False).save_pretrained(tmp_path / "backbone")
        return tmp_path / "backbone"

    def test_a_head_absent_from_the_checkpoint_trains_and_is_saved(self, backbone, tmp_path, caplog):
        base = ViTForImageClassification.from_pretrained(backbone, num_labels=4)
        with caplog.at_level(logging.WARNING, "veneer"):
            model = get_peft_model(base, LoraConfig(r=2))
        assert "newly initialised, so trained and saved with the adapter: classifier" in caplog.text
        assert model.peft_config["default"].modules_to_save == ["classifier"]
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert "base_model.model.classifier.veneer.default.weight" in trainable
        model.save_pretrained(tmp_path / "a")
        pixels = torch.randn(2, 3, 16, 16)
        again = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(backbone, num_labels=4), tmp_path / "a")
        assert torch.equal(again.eval()(pixel_values=pixels).logits, model.eval()(pixel_values=pixels).logits)

    def test_a_head_of_another_label_set_trains(self, tmp_path):
        ViTForImageClassification(ViTConfig(**CONFIG, num_labels=3)).save_pretrained(tmp_path)
        base = ViTForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
        assert get_peft_model(base, LoraConfig(r=2)).peft_config["default"].modules_to_save == ["classifier"]

    def test_a_trained_head_stays_frozen(self, tmp_path):
        ViTForImageClassification(ViTConfig(**CONFIG, num_labels=3)).save_pretrained(tmp_path)
        model = get_peft_model(ViTForImageClassification.from_pretrained(tmp_path), LoraConfig(r=2))
        assert model.peft_config["default"].modules_to_save is None
        assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)

    def test_a_new_part_of_the_backbone_is_named_and_left(self, backbone, caplog):
        with caplog.at_level(logging.WARNING, "veneer"):
            get_peft_model(ViTModel.from_pretrained(backbone), LoraConfig(r=2))
        assert "newly initialised and not trained: pooler.dense" in caplog.text

    def test_the_task_names_the_head(self):
        base = ViTForImageClassification(ViTConfig(**CONFIG, num_labels=3))
        model = get_peft_model(base, LoraConfig(r=2, task_type=TaskType.SEQ_CLS))
        assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 2 * 32 + 3 * 17

    def test_a_head_called_nearly_the_same_is_left(self):
        base = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2), "my_head": nn.Linear(2, 2)})
        model = get_peft_model(base, lora(target_modules=["body"], modules_to_save=["head"]))
        assert [n for n, p in model.named_parameters() if p.requires_grad and "head" in n] == [
            f"base_model.model.head.veneer.default.{n}" for n in ("weight", "bias")
        ]


class TestSeveral:
    def test_switching(self, x):
        model = get_peft_model(sequential(), lora(modules_to_save=["2"]))
        first = model(x)
        model.add_adapter("second", lora(r=3))
        assert model.active_adapters == ["default"] and torch.equal(model(x), first)
        model.set_adapter("second")
        second = model(x)
        assert not torch.equal(first, second)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            f"base_model.model.0.veneer.second.weight.lora_{f}" for f in "AB"
        }
        model.set_adapter("default")
        assert torch.equal(model(x), first)
        model.delete_adapter("second")
        assert torch.equal(model(x), first) and not any("second" in n for n, _ in model.named_parameters())

    def test_two_active_adapters_add_their_changes(self, x):
        model = get_peft_model(sequential(), lora())
        model.add_adapter("second", lora(use_dora=True))
        layer = model.get_base_model()[0]
        with torch.no_grad():
            layer.veneer["second"]["weight"].lora_magnitude_vector.mul_(1.5)
        outputs = {}
        for names in (["default"], ["second"], ["default", "second"]):
            model.set_adapter(names)
            outputs[tuple(names)] = layer(x)
        with model.disable_adapter():
            base = layer(x)
        torch.testing.assert_close(outputs["default", "second"], outputs[("default",)] + outputs[("second",)] - base)
        merged = model.merge_and_unload()[0](x)
        torch.testing.assert_close(merged, outputs["default", "second"])

    def test_a_new_head_copy_starts_from_the_original(self, x):
        model = get_peft_model(sequential(), lora(modules_to_save=["2"]))
        with torch.no_grad():
            model.get_base_model()[2].veneer["default"].weight.add_(1.0)
        model.add_adapter("second", lora(modules_to_save=["2"]))
        assert torch.equal(model.get_base_model()[2].veneer["second"].weight, sequential()[2].weight)

    @pytest.mark.parametrize(
        ("act", "error", "message"),
        [
            (lambda m: m.set_adapter("secnd"), StateError, "no adapter is called 'secnd'; attached are default"),
            (lambda m: m.delete_adapter("x"), StateError, "no adapter is called 'x'"),
            (lambda m: m.add_adapter("default", lora()), ConfigError, "is attached already"),
            (lambda m: m.add_adapter("a.b", lora()), ConfigError, "use letters, digits"),
            (lambda m: m.add_adapter("keys", lora()), ConfigError, "not the name of a dictionary's method"),
            (lambda m: m.add_adapter("b", lora(bias="all")), ConfigError, "trains the base's biases already"),
            (lambda m: get_peft_model(m, lora()), ConfigError, "is a PeftModel already"),
            (lambda m: get_peft_model(m.get_base_model(), lora()), ConfigError, "has adapters already"),
        ],
    )
    def test_refusals_leave_the_model_as_it_was(self, x, act, error, message):
        model = get_peft_model(sequential(), lora(bias="lora_only"))
        before = model(x)
        with pytest.raises(error, match=message):
            act(model)
        assert torch.equal(model(x), before) and model.active_adapters == ["default"] and list(model.peft_config) == ["default"]


class TestMerging:
    def test_a_tied_weight_does_not_change_its_twin(self, x):
        base = sequential()
        base.append(nn.Linear(6, 5))
        base[3].weight = base[0].weight
        before = base[3].weight.detach().clone()
        merged = get_peft_model(base, lora()).merge_and_unload()
        assert torch.equal(merged[3].weight, before) and not torch.equal(merged[0].weight, before)

    def test_numbers_that_are_not_finite_are_refused(self, x):
        model = get_peft_model(sequential(), lora(target_modules=["0", "2"]))
        with torch.no_grad():
            model.get_base_model()[2].veneer["default"]["weight"].lora_A.fill_(float("inf"))
        before = model.get_base_model()[0].weight.detach().clone()
        with pytest.raises(StateError, match="numbers into 2; nothing was merged"):
            model.merge_and_unload(safe_merge=True)
        assert torch.equal(model.get_base_model()[0].weight, before) and model.active_adapters == ["default"]

    def test_merging_twice_is_refused(self):
        model = get_peft_model(sequential(), lora())
        model.merge_adapter()
        with pytest.raises(StateError, match="merged already"):
            model.merge_adapter()

    def test_bf16_merges_do_not_drift(self, x):
        model = get_peft_model(sequential().bfloat16(), lora())
        before = model.get_base_model()[0].weight.detach().clone()
        for _ in range(5):
            model.merge_adapter()
            model.unmerge_adapter()
        assert torch.equal(model.get_base_model()[0].weight, before)

    def test_saved_modules_and_biases_are_merged_in(self, x):
        model = get_peft_model(sequential(), lora(modules_to_save=["2"], bias="lora_only")).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.3)
        y = model(x)
        merged = model.merge_and_unload()
        assert [type(m) for m in merged] == [nn.Linear, nn.ReLU, nn.Linear]
        torch.testing.assert_close(merged(x), y)


def test_a_layer_whose_parent_never_calls_it_is_reported():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x):
            return nn.functional.linear(x, self.inner.weight)

    model = get_peft_model(Reads(), lora(target_modules=["inner"]))
    with pytest.warns(UserWarning, match="not called in the first forward, such as inner"):
        model(torch.randn(1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(1, 6))


def test_attaching_to_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = get_peft_model(sequential(), lora(use_dora=True))
    assert all(p.is_meta for p in model.parameters())


def test_an_adapter_trains_further_only_when_asked(tmp_path):
    get_peft_model(sequential(), lora()).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(sequential(), tmp_path).get_nb_trainable_parameters()[0] == 0
    assert PeftModel.from_pretrained(sequential(), tmp_path, is_trainable=True).get_nb_trainable_parameters()[0] == 22
