"""A model that is not on the CPU: PyTorch's lazy device, a second device that every build of PyTorch has.

Its tensors hold numbers of their own, operations between it and the CPU are refused as between a GPU and the CPU, and it has no autocast.
"""

from __future__ import annotations

import pytest
import torch
import torch._lazy.ts_backend
from small_vit import config, lora, outputs, shaken, tensors, vit
from torch import nn

from veneer import ConfigError, PeftModel, StateError, get_peft_model
from veneer.config import config_classes
from veneer.inject import record

LAZY = torch.device("lazy", 0)
LABELS = torch.tensor([0, 1])


@pytest.fixture(scope="module", autouse=True)
def backend():
    torch._lazy.ts_backend.init()


@pytest.fixture
def x() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"pixel_values": torch.randn(2, 3, 16, 16).to(LAZY)}


def two(method: str = "LORA", **options) -> PeftModel:
    """A head of one's own and an adapter of the method, and a LoRA; the second is active."""
    model = get_peft_model(vit(), lora(), "other").eval()
    model.add_adapter("a", config(method, modules_to_save=["classifier"], **options))
    for name in ("a", "other"):
        shaken(model, name)
    return model


def packs(model: PeftModel, name: str) -> set[str]:
    """The devices on which a packed adapter's tensors lie."""
    return {t.device.type for t in record(model.get_base_model()).shelf.waiting[name].packed.packs}


def on_cpu(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.cpu() for k, v in found.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v.cpu(), other[k].cpu()) for k, v in one.items())


@pytest.mark.parametrize("method", config_classes())
class TestEveryMethod:
    def test_runs_as_on_the_cpu(self, method, x):
        model = two(method)
        model.set_adapter("a")
        expected = model(pixel_values=x["pixel_values"].cpu()).logits
        assert torch.allclose(model.to(LAZY)(**x).logits.cpu(), expected, atol=1e-5)

    def test_trains_as_on_the_cpu(self, method, x):
        if method == "OFT":
            pytest.skip("the lazy device makes the indices of OFT's gradient on the CPU")

        def trained(device: torch.device) -> dict[str, torch.Tensor]:
            model = two(method).to(device).train()
            model.set_adapter("a")
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                model(pixel_values=x["pixel_values"].to(device), labels=LABELS.to(device)).loss.backward()
                optimizer.step()
            return {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}

        there, here = trained(LAZY), trained(torch.device("cpu"))
        assert there.keys() == here.keys() and here
        assert all(torch.allclose(there[k], here[k], atol=1e-4) for k in here)

    def test_goes_to_the_cpu_and_comes_back_bit_for_bit(self, method, x):
        model = two(method).to(LAZY)
        model.set_adapter("a")
        before, expected = tensors(model, "a"), model(**x).logits.cpu()
        model.set_adapter("other")
        model.hold(attached=1, device_bytes=0, offload="cpu")
        assert model.adapter_locations == {"other": "attached", "a": "cpu"} and packs(model, "a") == {"cpu"}
        model.set_adapter("a")
        assert model.adapter_locations == {"other": "cpu", "a": "attached"} and packs(model, "other") == {"cpu"}
        after = tensors(model, "a")
        assert same(after, before) and {t.device for t in after.values()} == {LAZY}
        assert torch.equal(model(**x).logits.cpu(), expected)

    def test_mixed_batch_fetches_it_from_the_cpu(self, method, x):
        model = two(method).to(LAZY)
        expected = [model_of(model, name)(**x).logits[i].cpu() for i, name in enumerate(("a", "other"))]
        model.hold(attached=1, device_bytes=10**6, offload="cpu")
        shelf = record(model.get_base_model()).shelf
        shelf._move("a")
        assert model.adapter_locations["a"] == "cpu"
        found = model(**x, adapter_names=["a", "other"]).logits
        assert model.adapter_locations["a"] == "packed" and packs(model, "a") == {"lazy"}
        assert all(torch.allclose(f.cpu(), e, atol=1e-5) for f, e in zip(found, expected, strict=True))

    def test_merges_there_and_is_restored(self, method, x):
        model = two(method).to(LAZY)
        model.set_adapter("a")
        expected = model(**x).logits.cpu()
        own = {n: p.detach().cpu().clone() for n, p in model.get_base_model().named_parameters()}
        model.merge_adapter(safe=True)
        assert torch.allclose(model(**x).logits.cpu(), expected, atol=1e-5)
        assert any(not torch.equal(p.cpu(), own[n]) for n, p in model.get_base_model().named_parameters())
        model.unmerge_adapter()
        assert same(dict(model.get_base_model().named_parameters()), own)
        assert {p.device for p in model.parameters()} == {LAZY}
        assert torch.allclose(model(**x).logits.cpu(), expected, atol=1e-6)


def test_originals_that_would_become_other_objects_elsewhere_are_refused():
    model = two().to(LAZY)
    model.set_adapter("a")
    before = {n: (p, p.detach().cpu().clone()) for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="stay the same object"):
        model.merge_adapter(["other"], originals_device="cpu")
    assert model.active_adapters == ["a"]
    assert all(p is before[n][0] and torch.equal(p.cpu(), before[n][1]) for n, p in model.named_parameters())


def model_of(model: PeftModel, name: str) -> PeftModel:
    model.set_adapter(name)
    return model


class TestBudget:
    @pytest.fixture
    def three(self) -> PeftModel:
        model = get_peft_model(vit(), lora(), "a")
        model.add_adapter("b", lora(r=3, modules_to_save=["classifier"]))
        model.add_adapter("c", lora())
        for name in "abc":
            shaken(model, name)
        return model.eval().to(LAZY)

    def test_the_least_recently_used_goes_first(self, three, x):
        expected = on_cpu(outputs(three, x))
        three.set_adapter("c")
        size = record(three.get_base_model()).plans["b"].trainable * 4
        three.hold(attached=1, device_bytes=size, offload="cpu")
        assert three.adapter_locations == {"a": "cpu", "b": "packed", "c": "attached"}
        assert (packs(three, "a"), packs(three, "b")) == ({"cpu"}, {"lazy"})
        for name in "bcabca":
            assert torch.equal(outputs(three, x, name)[name].cpu(), expected[name])

    def test_disk_behind_another_device(self, three, x, tmp_path):
        expected = on_cpu(outputs(three, x))
        three.set_adapter("c")
        three.hold(attached=1, device_bytes=0, offload=tmp_path / "held")
        assert three.adapter_locations == {"a": "disk", "b": "disk", "c": "attached"}
        for name in "abcab":
            assert torch.equal(outputs(three, x, name)[name].cpu(), expected[name])
        assert {p.device for p in three.parameters()} == {LAZY}

    def test_files_go_onto_the_models_device(self, three, x, tmp_path):
        expected = outputs(three, x, "b")["b"].cpu()
        three.save_pretrained(tmp_path)
        for name in ("d", "e"):
            three.load_adapter(tmp_path / "b", name, packed=True)
            assert packs(three, name) == {"lazy"}
            assert torch.equal(outputs(three, x, name)[name].cpu(), expected)

    def test_a_batch_larger_than_the_budget_is_refused(self, three, x):
        three.set_adapter("c")
        three.hold(attached=1, device_bytes=0, offload="cpu")
        with pytest.raises(StateError, match="give it more"):
            three(**x, adapter_names=["a", "b"])
        assert three.adapter_locations == {"a": "cpu", "b": "cpu", "c": "attached"}

    def test_on_the_cpu_it_is_refused(self):
        with pytest.raises(ConfigError, match="is on the CPU already"):
            get_peft_model(vit(), lora()).hold(attached=1, device_bytes=0, offload="cpu")


def test_a_file_is_written_and_read_there(x, tmp_path):
    model = two(init_lora_weights=False).to(LAZY)
    model.set_adapter("a")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(vit().to(LAZY), tmp_path / "a").eval()
    assert {p.device for p in again.parameters()} == {LAZY}
    assert torch.allclose(again(**x).logits.cpu(), model(**x).logits.cpu(), atol=1e-6)


def test_attaching_there_makes_the_parameters_there():
    for method in config_classes():
        model = get_peft_model(nn.ModuleDict({"q_proj": nn.Linear(8, 8), "fc1": nn.Linear(8, 8)}).to(LAZY), config(method))
        assert {t.device for t in [*model.parameters(), *model.buffers()]} == {LAZY}
