"""Holding adapters: switching, packing bit for bit, budgets, and what is refused."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from small_vit import NAMED, config, lora, outputs, shaken, tensors, vit
from torch import nn

import veneer
from veneer import AdapterFileError, ConfigError, LoraConfig, PeftModel, StateError, get_peft_model
from veneer.config import config_classes
from veneer.inject import adapted_modules, holders, record
from veneer.layers import SavedModule, restore


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.fixture
def x() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


@pytest.fixture
def three() -> PeftModel:
    """Three adapters, the first one active; the second has a head of its own."""
    model = get_peft_model(vit(), lora(), "a")
    model.add_adapter("b", lora(r=3, modules_to_save=["classifier"]))
    model.add_adapter("c", lora())
    for name in "abc":
        shaken(model, name)
    return model.eval()


class TestSwitching:
    def test_only_the_adapters_that_change_are_touched(self, three):
        base = three.get_base_model()
        places = {n: p.data_ptr() for n, p in base.named_parameters()}
        versions = {n: p._version for n, p in base.named_parameters()}
        visited = []
        patched = veneer.reach.train

        def counting(parameters, on):
            visited.extend(parameters)
            return patched(parameters, on)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(veneer.reach, "train", counting)
            three.set_adapter("c")
        parts = [m for h in holders(base) for n in "ac" if n in h.veneer for m in h.veneer[n].modules()]
        assert {id(own) for own in visited} == {id(m._parameters) for m in parts if m._parameters}
        assert {n: p.data_ptr() for n, p in base.named_parameters()} == places
        assert {n: p._version for n, p in base.named_parameters()} == versions

    def test_what_is_inactive_never_requires_grad(self, three, tmp_path, x):
        three.save_pretrained(tmp_path)

        def training() -> set[str]:
            return {n.split(".veneer.")[1].split(".")[0] for n, p in three.named_parameters() if p.requires_grad}

        assert training() == {"a"}
        three.load_adapter(tmp_path / "b", "d", is_trainable=True)
        assert training() == {"a"}
        three.set_adapter(["b", "d"])
        assert training() == {"b", "d"}
        three.pack_adapter("a")
        three.set_adapter("b")
        three.delete_adapter("c")
        three.load_adapter(tmp_path / "c", "c")
        assert training() == {"b"}
        three.set_adapter("a", inference_mode=True)
        assert training() == set()

    def test_modules_that_were_turned_one_by_one_are_turned_back(self, three):
        modules = [m for _, m in adapted_modules(three.get_base_model())]
        modules[0].set_adapter("b")
        three.set_adapter("c")
        assert all(m.veneer_active == ("c",) for m in modules)
        assert all("veneer.c." in n for n, p in three.named_parameters() if p.requires_grad)

    def test_an_adapter_that_was_turned_on_one_module_and_then_packed_comes_back_whole(self, three, x):
        expected = outputs(three, x)
        three.set_adapter("a")
        module = next(m for _, m in adapted_modules(three.get_base_model()))
        module.set_adapter("c")
        three.set_adapter("a")
        module.set_adapter(["a", "c"])
        module.set_adapter("a")
        three.pack_adapter("c")
        three.set_adapter("b")
        three.set_adapter("c")
        assert torch.equal(three(**x).logits, expected["c"])

    @pytest.mark.parametrize("change", ["copied", "compiled", "wrapped", "whole"])
    def test_reaches_layers_that_other_code_has_replaced_or_wrapped(self, three, x, change):
        expected = outputs(three, x)
        if change == "whole":
            three = copy.deepcopy(three)
        else:
            layers = three.get_base_model().vit.layers
            make = {"copied": copy.deepcopy, "compiled": lambda m: torch.compile(m, backend="eager"), "wrapped": Wrapper}[change]
            layers[0] = make(layers[0])
        found = outputs(three, x, "cba")
        assert all(torch.equal(found[n], expected[n]) for n in "abc")
        on = [n for n, p in three.named_parameters() if p.requires_grad]
        assert on and all("veneer.a." in n for n in on)
        with three.disable_adapter():
            assert torch.equal(three(**x).logits, vit()(**x).logits)

    def test_a_copy_is_switched_alone(self, three, x):
        three.set_adapter("b")
        other = copy.deepcopy(three)
        other.set_adapter("c")
        for model, name in ((three, "b"), (other, "c")):
            assert {m.veneer_active for _, m in adapted_modules(model.get_base_model())} == {(name,)}

    def test_a_layer_that_other_code_has_put_back_stays_as_it_is(self, three):
        three.set_adapter("b")
        _, module = next(iter(adapted_modules(three.get_base_model())))
        restore(module)
        three.set_adapter("c")
        assert not hasattr(module, "veneer_active") and type(module) is torch.nn.Linear
        assert {m.veneer_active for _, m in adapted_modules(three.get_base_model())} == {("c",)}

    def test_disabling_is_the_base_for_every_adapter(self, three, x):
        alone = vit()(**x).logits
        for name in "abc":
            three.set_adapter(name)
            with three.disable_adapter():
                assert torch.equal(three(**x).logits, alone)


class TestPacking:
    @pytest.mark.parametrize("method", config_classes())
    def test_comes_back_bit_for_bit(self, method, x):
        model = get_peft_model(vit(), lora(), "other").eval()
        model.add_adapter("a", config(method, modules_to_save=["classifier"]))
        shaken(model, "a")
        model.set_adapter("a")
        before, expected = tensors(model, "a"), model(**x).logits
        model.set_adapter("other")
        model.pack_adapter("a")
        assert model.adapter_locations == {"other": "attached", "a": "packed"}
        assert not tensors(model, "a") and list(model.peft_config) == ["other", "a"]
        assert not any(".veneer.a." in n for n in model.state_dict())
        model.set_adapter("a")
        after = tensors(model, "a")
        assert after.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in after.items())
        assert torch.equal(model(**x).logits, expected)

    @pytest.mark.parametrize("method", config_classes())
    def test_is_read_where_it_lies(self, method, x):
        model = get_peft_model(vit(), lora(), "other").eval()
        model.add_adapter("a", config(method, modules_to_save=["classifier"]))
        shaken(model, "a")

        def equations() -> list[torch.Tensor]:
            return [m.equation_of("a", t).dense() for _, m in adapted_modules(model.get_base_model()) for t in m.veneer_kinds if m.at("a")]

        head = next(m for m in model.modules() if isinstance(m, SavedModule))
        z = torch.randn(3, 16)
        before, named = equations(), head.copy_of("a")(z)
        model.pack_adapter("a")
        assert len(before) == 4 and all(torch.equal(a, b) for a, b in zip(before, equations(), strict=True))
        assert torch.equal(head.copy_of("a")(z), named)
        assert head.copy_of("other") is None and model.adapter_locations["a"] == "packed"

    def test_equal_configurations_share_all_but_numbers(self, three):
        for i in range(5):
            three.add_adapter(f"n{i}", lora())
            three.pack_adapter(f"n{i}")
        three.pack_adapter("b")
        shelf = record(three.get_base_model()).shelf
        assert len(shelf.patterns) == 2
        assert len({id(record(three.get_base_model()).plans[f"n{i}"]) for i in range(5)}) == 1
        own = {n: w.packed.packs for n, w in shelf.waiting.items()}
        assert all(len(packs) == 1 for packs in own.values()) and len({packs[0].data_ptr() for packs in own.values()}) == 6

    def test_different_numbers_of_equal_shapes_are_not_mixed_up(self, x):
        model = get_peft_model(vit(), lora(lora_alpha=8), "a").eval()
        model.add_adapter("b", lora(lora_alpha=32))
        model.add_adapter("c", lora(lora_alpha=8))
        expected = outputs(model, x)
        model.pack_adapter("a")
        model.pack_adapter("b")
        assert all(torch.equal(t, expected[n]) for n, t in outputs(model, x).items())

    def test_a_weighted_adapter_keeps_its_weight(self, three, x):
        for _, module in adapted_modules(three.get_base_model()):
            module.set_scale("c", 0.5)
        expected = outputs(three, x)
        three.set_adapter("a")
        three.pack_adapter("c")
        assert torch.equal(outputs(three, x, "c")["c"], expected["c"])

    def test_saving_writes_packed_ones(self, three, tmp_path):
        three.save_pretrained(tmp_path / "attached")
        three.pack_adapter("b")
        three.save_pretrained(tmp_path / "packed")
        for file in ("adapter_config.json", "adapter_model.safetensors", "labels.json"):
            assert (tmp_path / "packed" / "b" / file).read_bytes() == (tmp_path / "attached" / "b" / file).read_bytes()

    def test_copies_of_the_model_have_it(self, three, x):
        expected = outputs(three, x)
        three.set_adapter("a")
        three.pack_adapter("b")
        buffer = io.BytesIO(pickle.dumps(three))
        for again in (copy.deepcopy(three), pickle.load(buffer)):
            assert again.adapter_locations == three.adapter_locations
            assert all(torch.equal(t, expected[n]) for n, t in outputs(again, x).items())
            assert again.adapter_locations["b"] == "attached" and three.adapter_locations["b"] == "packed"

    def test_an_optimiser_goes_on_with_the_same_parameters(self, three, x):
        three.set_adapter("c")
        own = [p for p in three.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(own, lr=0.1)
        three.set_adapter("a")
        three.pack_adapter("c")
        assert all(p.numel() == 0 for p in own)
        three.set_adapter("c")
        before = three(**x).logits.detach()
        three(**x).logits.square().sum().backward()
        optimizer.step()
        assert not torch.equal(three(**x).logits, before)
        assert {id(p) for p in three.parameters() if p.requires_grad} == {id(p) for p in own}

    def test_the_status_names_packed_ones(self, three):
        three.pack_adapter("b")
        status = {s.name.rpartition(".")[2]: s for s in veneer.get_layer_status(three)}
        assert status["q_proj"].available_adapters == ["a", "b", "c"] and status["classifier"].available_adapters == ["b"]
        assert status["q_proj"].requires_grad == {"a": True, "c": False} and status["classifier"].requires_grad == {}
        assert veneer.get_model_status(three).available_adapters == ["a", "b", "c"]

    def test_one_module_cannot_switch_to_a_packed_one(self, three):
        three.pack_adapter("c")
        module = next(m for _, m in adapted_modules(three.get_base_model()))
        with pytest.raises(StateError, match="'c' is packed, and one module cannot attach it"):
            module.set_adapter("c")
        assert three.active_adapters == ["a"]

    def test_merging_a_packed_one(self, three, x):
        expected = outputs(three, x)
        three.set_adapter("a")
        three.pack_adapter("b")
        three.merge_adapter(["b"])
        assert torch.allclose(three(**x).logits, expected["b"], atol=1e-6)
        with pytest.raises(StateError, match="merged into the weights"):
            three.set_adapter("a")
            three.pack_adapter("b")
        three.unmerge_adapter()
        three.pack_adapter("b")
        assert torch.allclose(three.merge_and_unload(adapter_names=["b"])(**x).logits, expected["b"], atol=1e-6)

    def test_unloading_gives_the_base_back(self, three, x):
        three.pack_adapter("b")
        assert torch.equal(three.unload()(**x).logits, vit()(**x).logits)

    def test_deleting_a_packed_one(self, three):
        three.pack_adapter("b")
        three.delete_adapter("b")
        assert list(three.adapter_locations) == ["a", "c"]
        with pytest.raises(StateError, match="no adapter is called 'b'"):
            three.set_adapter("b")

    def test_loading_over_a_packed_one(self, three, tmp_path, x):
        three.save_pretrained(tmp_path)
        expected = outputs(three, x)
        three.set_adapter("a")
        shaken(three, "b")
        three.pack_adapter("b")
        three.load_adapter(tmp_path / "b", "b", packed=True)
        assert three.adapter_locations["b"] == "packed"
        assert torch.equal(outputs(three, x, "b")["b"], expected["b"])

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda m: m.pack_adapter("a"), "'a' is active; make another one active first"),
            (lambda m: m.pack_adapter("aa"), "no adapter is called 'aa'"),
            (lambda m: (m(pixel_values=torch.ones(1, 3, 16, 16)).logits.sum().backward(), m.set_adapter("b"), m.pack_adapter("a")), "zero_grad"),
            (lambda m: (m.add_adapter("d", lora(bias="all")), m.pack_adapter("d")), "the base model's own biases"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_packed(self, three, make, message):
        with pytest.raises(StateError, match=message):
            make(three)
        assert set(three.adapter_locations.values()) == {"attached"}


class TestLoading:
    def test_many_of_one_configuration(self, three, tmp_path, x):
        three.save_pretrained(tmp_path)
        expected = outputs(three, x)
        for i in range(4):
            three.load_adapter(tmp_path / "b", f"b{i}", packed=True)
        shelf = record(three.get_base_model()).shelf
        assert len(shelf.patterns) == 1 and {three.adapter_locations[f"b{i}"] for i in range(4)} == {"packed"}
        assert all(torch.equal(t, expected["b"]) for t in outputs(three, x, ["b0", "b1", "b2", "b3"]).values())
        assert three.config.id2label == NAMED["id2label"]

    def test_the_second_is_held_against_the_first(self, three, tmp_path):
        three.save_pretrained(tmp_path)
        three.load_adapter(tmp_path / "a", "n0", packed=True)
        file = tmp_path / "a" / "adapter_model.safetensors"
        good = file.read_bytes()
        found = veneer.load_peft_weights(tmp_path / "a")
        from safetensors.torch import save

        first = next(iter(found))
        for broken, message in [
            (save({k: t for k, t in found.items() if k != first}), "1 missing"),
            (save(found | {first: found[first] * float("nan")}), "NaN"),
            (save(found | {first: torch.zeros(9, 16)}), "has shape"),
            (good[:-5], "damaged"),
        ]:
            file.write_bytes(broken)
            with pytest.raises(AdapterFileError, match=message):
                three.load_adapter(tmp_path / "a", "n1", packed=True)
            assert list(three.peft_config) == ["a", "b", "c", "n0"]
        file.write_bytes(good)
        with pytest.raises(ConfigError, match="use letters"):
            three.load_adapter(tmp_path / "a", "n 1", packed=True)
        three.load_adapter(tmp_path / "a", "n1", packed=True)


class TestBudget:
    def test_the_least_recently_used_are_packed(self, three, x):
        expected = outputs(three, x)
        three.hold(attached=2)
        assert three.adapter_locations == {"a": "packed", "b": "attached", "c": "attached"}
        three.set_adapter("b")
        three.set_adapter("a")
        assert three.adapter_locations == {"a": "attached", "b": "attached", "c": "packed"}
        assert all(torch.equal(t, expected[n]) for n, t in outputs(three, x, "cabcab").items())
        three.hold()
        three.set_adapter("c")
        three.set_adapter("a")
        three.set_adapter("b")
        assert set(three.adapter_locations.values()) == {"attached"}

    def test_new_ones_count(self, three, tmp_path):
        three.save_pretrained(tmp_path)
        three.hold(attached=3)
        three.set_adapter("b")
        three.load_adapter(tmp_path / "a", "d")
        assert three.adapter_locations == {"a": "packed", "b": "attached", "c": "attached", "d": "attached"}
        three.hold(attached=1)
        three.add_adapter("e", lora())
        assert three.adapter_locations["b"] == "attached" and three.adapter_locations["e"] == "packed"

    def test_disk(self, three, tmp_path, x):
        expected = outputs(three, x)
        three.set_adapter("c")
        size = record(three.get_base_model()).plans["b"].trainable * 4
        three.hold(attached=1, device_bytes=size, offload=tmp_path / "held")
        assert three.adapter_locations == {"a": "disk", "b": "packed", "c": "attached"}
        again = PeftModel.from_pretrained(vit(), tmp_path / "held" / "a").eval()
        assert torch.equal(again(**x).logits, expected["a"])
        for name in "bcabca":
            assert torch.equal(outputs(three, x, name)[name], expected[name])
        assert three.config.id2label == NAMED["id2label"]
        three.set_adapter("a")
        three.save_pretrained(tmp_path / "saved")
        assert torch.equal(PeftModel.from_pretrained(vit(), tmp_path / "saved" / "b").eval()(**x).logits, expected["b"])

    @pytest.mark.parametrize("method", config_classes())
    def test_every_method_comes_back_from_disk_bit_for_bit(self, method, tmp_path):
        model = get_peft_model(vit(), lora(), "other").eval()
        model.add_adapter("a", config(method, modules_to_save=["classifier"]))
        shaken(model, "a")
        before = tensors(model, "a")
        model.hold(attached=1, device_bytes=0, offload=tmp_path)
        assert model.adapter_locations["a"] == "disk"
        model.set_adapter("a")
        after = tensors(model, "a")
        assert after.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in after.items())
        PeftModel.from_pretrained(vit(), tmp_path / "other")

    def test_an_unchanged_adapter_is_not_written_again(self, three, tmp_path):
        three.hold(attached=1, device_bytes=0, offload=tmp_path)
        file = tmp_path / "b" / "adapter_model.safetensors"
        first = file.stat().st_ino
        three.set_adapter("b")
        three.set_adapter("a")
        assert three.adapter_locations["b"] == "disk" and file.stat().st_ino == first
        three.set_adapter("b")
        shaken(three, "b")
        three.set_adapter("a")
        assert file.stat().st_ino != first and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]

    def test_what_was_changed_on_disk_is_refused(self, three, tmp_path, x):
        expected = outputs(three, x)
        three.set_adapter("a")
        three.hold(attached=1, device_bytes=0, offload=tmp_path)
        (tmp_path / "b" / "adapter_model.safetensors").write_bytes((tmp_path / "c" / "adapter_model.safetensors").read_bytes())
        (tmp_path / "c" / "adapter_model.safetensors").unlink()
        for name in "bc":
            with pytest.raises(AdapterFileError, match=f"{name}'? waits in .*changed or removed"):
                three.set_adapter(name)
            assert three.active_adapters == ["a"] and three.adapter_locations == {"a": "attached", "b": "disk", "c": "disk"}
            assert torch.equal(three(**x).logits, expected["a"])

    def test_only_folders_of_its_own_are_removed_and_written(self, three, tmp_path):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "mine.txt").write_text("mine")
        three.hold(attached=1, device_bytes=0, offload=tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "b-2", "c"]
        three.set_adapter("c")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "b-2", "c"]
        three.delete_adapter("c")
        three.delete_adapter("b")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
        assert (tmp_path / "b" / "mine.txt").read_text() == "mine"

    def test_a_copy_of_the_model_leaves_the_folders_alone(self, three, tmp_path):
        three.hold(attached=1, device_bytes=0, offload=tmp_path)
        again = copy.deepcopy(three)
        again.set_adapter("b")
        shaken(again, "b")
        again.set_adapter("a")
        again.delete_adapter("c")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "b-2", "c"]
        three.set_adapter("b")
        three.set_adapter("c")

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"attached": 0}, ConfigError, "attached: a whole number of at least 1"),
            ({"device_bytes": 10}, ConfigError, "go together"),
            ({"offload": "here"}, ConfigError, "go together"),
            ({"device_bytes": 10, "offload": "cpu"}, ConfigError, "is on the CPU already"),
            ({"device_bytes": 10, "offload": __file__}, ConfigError, "cannot be written"),
            ({"attached": 1}, StateError, "2 adapters at once, and the budget allows 1"),
        ],
    )  # fmt: skip
    def test_budgets_that_cannot_be_kept(self, three, options, error, message):
        three.set_adapter(["a", "b"])
        with pytest.raises(error, match=message):
            three.hold(**options)
        three.set_adapter(["a", "b", "c"])
        assert set(three.adapter_locations.values()) == {"attached"}

    def test_more_at_once_than_the_budget_is_refused(self, three):
        three.hold(attached=2)
        three.set_adapter(["a", "b"])
        with pytest.raises(StateError, match="3 adapters at once, and the budget allows 2"):
            three.set_adapter(["a", "b", "c"])
        assert three.active_adapters == ["a", "b"]

    def test_what_trains_is_not_packed_for_a_budget(self, three, x):
        three.hold(attached=1)
        three(**x).logits.sum().backward()
        with pytest.raises(StateError, match="others cannot be packed: 'a' is being trained"):
            three.set_adapter("b")
        assert three.active_adapters == ["a"]
        three.zero_grad()
        three.set_adapter("b")

    def test_saving_reads_what_is_away_and_leaves_it_there(self, three, tmp_path):
        three.save_pretrained(tmp_path / "before")
        three.hold(attached=1, device_bytes=10, offload=tmp_path / "held")
        three.save_pretrained(tmp_path / "after")
        assert three.adapter_locations == {"a": "attached", "b": "disk", "c": "disk"}
        for name in "abc":
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                assert (tmp_path / "after" / name / file).read_bytes() == (tmp_path / "before" / name / file).read_bytes()

    def test_a_batch_larger_than_the_budget_is_refused(self, three, tmp_path, x):
        expected = three(**x, adapter_names=["b", "c"]).logits
        three.hold(attached=1, device_bytes=10, offload=tmp_path)
        with pytest.raises(StateError, match="packed adapters of this batch have 1,484 bytes, and the budget for packed adapters is 10"):
            three(**x, adapter_names=["b", "c"])
        three.hold(attached=1, device_bytes=1500, offload=tmp_path)
        assert torch.allclose(three(**x, adapter_names=["b", "c"]).logits, expected, atol=1e-6)
        assert three.adapter_locations == {"a": "attached", "b": "packed", "c": "packed"}

    def test_a_directory_that_went_away_loses_nothing(self, three, tmp_path, x):
        three.delete_adapter("b")
        expected = outputs(three, x, "ac")
        three.hold(attached=1, device_bytes=600, offload=tmp_path / "held")
        (tmp_path / "held").rmdir()
        (tmp_path / "held").write_text("a file stands in the way")
        assert three.adapter_locations == {"a": "packed", "c": "attached"}
        with pytest.raises(AdapterFileError, match="'a' cannot be moved to .*; it stays in memory"):
            three.add_adapter("d", lora())
        assert three.adapter_locations == {"a": "packed", "c": "attached"}
        assert all(torch.equal(t, expected[n]) for n, t in outputs(three, x, "ac").items())


class TestMixedBatches:
    @pytest.mark.parametrize("method", config_classes())
    def test_packed_adapters_take_part_as_they_are(self, method, x):
        model = get_peft_model(vit(), config(method), "a").eval()
        model.add_adapter("b", config(method, modules_to_save=["classifier"]))
        model.add_adapter("c", config(method, modules_to_save=["classifier"]))
        for name in "abc":
            shaken(model, name)
        pixels = torch.randn(4, 3, 16, 16)
        names = ["b", "a", "__base__", "c"]
        expected = model(pixel_values=pixels, adapter_names=names).logits
        model.pack_adapter("b")
        model.pack_adapter("c")
        assert torch.allclose(model(pixel_values=pixels, adapter_names=names).logits, expected, atol=1e-6)
        assert model.adapter_locations == {"a": "attached", "b": "packed", "c": "packed"}


def test_memory_beside_the_tensors(tmp_path):
    """A packed adapter is its tensors and little else: counted on widths where they are small, so that what is beside them would show."""
    import gc
    import tracemalloc

    base = nn.Sequential(*(nn.Linear(128, 128) for _ in range(24)))
    model = get_peft_model(base, LoraConfig(r=8, target_modules=[str(i) for i in range(24)]), "a0")
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "a0", "a1", packed=True)
    gc.collect()
    tracemalloc.start()
    for i in range(2, 42):
        model.load_adapter(tmp_path / "a0", f"a{i}", packed=True)
    gc.collect()
    beside = tracemalloc.get_traced_memory()[0] / 40
    tracemalloc.stop()
    modules = sum(1 for _ in model.modules())
    model.load_adapter(tmp_path / "a0", "a42", packed=True)
    assert sum(1 for _ in model.modules()) == modules
    assert beside < 0.05 * 24 * 8 * 768 * 2 * 4, f"{beside:.0f} bytes beside each adapter's tensors"
    assert json.loads((tmp_path / "a0" / "adapter_config.json").read_text())["r"] == 8
