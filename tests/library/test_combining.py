"""Weighted combinations: laws of the sum, pruning against its papers' definitions, what comes along, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from veneer import (
    AdaLoraConfig,
    ConfigError,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    StateError,
    get_peft_model,
)
from veneer.combining.vectors import dropped, trimmed

SIZES = st.floats(-2, 2, width=16)
LAWS = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def randomised(model: nn.Module, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if f".{name}." in n:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(p * (1 + 0.3 * noise) if n.endswith("magnitude_vector") else 0.4 * noise)


def model_of(**configs) -> PeftModel:
    names = list(configs)
    model = get_peft_model(base(), configs[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    for i, name in enumerate(names):
        randomised(model, name, 7 + i)
    return model.eval()


def change(model, name: str, layer: str = "0") -> torch.Tensor:
    module = model.get_base_model().get_submodule(layer)
    e = module.equation_of(name, "weight")
    return torch.zeros_like(module.weight) if e is None else (e.dense() - module.weight).detach()


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0", "2"]} | options)


def three() -> PeftModel:
    return model_of(
        a=lora(lora_alpha=3),
        b=lora(r=4, use_rslora=True, target_modules=["0"]),
        c=LoHaConfig(r=2, target_modules=["2"]),
        d=lora(rank_pattern={"0": 3}, alpha_pattern={"2": 5}),
    )


def combined(model, weights, kind="linear", **options):
    model.add_weighted_adapter(list(weights), list(weights.values()), "new", kind, **options)
    found = {layer: change(model, "new", layer) for layer in ("0", "2")}
    model.delete_adapter("new")
    return found


def same(found, wanted, tolerance=1e-10):
    for layer, M in wanted.items():
        torch.testing.assert_close(found[layer], M, rtol=tolerance, atol=tolerance)


class TestLaws:
    @LAWS
    @given(a=SIZES, b=SIZES, c=SIZES, d=SIZES, kind=st.sampled_from(["linear", "cat", "svd"]))
    def test_the_change_is_the_weighted_sum(self, a, b, c, d, kind):
        model, weights = three(), {"a": a, "b": b, "c": c, "d": d}
        if not any(weights.values()):
            return
        wanted = {layer: sum(w * change(model, n, layer) for n, w in weights.items()) for layer in ("0", "2")}
        same(combined(model, weights, kind, **({"svd_rank": 12} if kind == "svd" else {})), wanted)

    @LAWS
    @given(order=st.permutations(["a", "b", "c", "d"]), kind=st.sampled_from(["linear", "svd", "ties_svd"]))
    def test_the_order_does_not_matter(self, order, kind):
        model, weights = three(), {"a": 1.0, "b": -0.5, "c": 2.0, "d": 0.25}
        options = {"density": 0.5} if kind == "ties_svd" else {}
        first = combined(model, weights, kind, **options)
        same(combined(model, {n: weights[n] for n in order}, kind, **options), first, 1e-8)

    @LAWS
    @given(
        s=SIZES.filter(lambda s: abs(s) > 0.05),
        kind=st.sampled_from(["linear", "cat", "svd", "ties", "magnitude_prune", "ties_svd", "dare_linear"]),
    )
    def test_scaling_the_weights_scales_the_change(self, s, kind):
        model = model_of(a=lora(lora_alpha=3), b=lora(lora_alpha=7))
        options = {"density": 0.5} if kind not in ("linear", "cat", "svd") else {}
        torch.manual_seed(3)
        one = combined(model, {"a": 1.5, "b": -0.5}, kind, **options)
        torch.manual_seed(3)
        same(combined(model, {"a": 1.5 * s, "b": -0.5 * s}, kind, **options), {k: s * M for k, M in one.items()}, 1e-8)

    @pytest.mark.parametrize(
        "kind", ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_ties_svd"]
    )
    def test_an_adapter_of_weight_zero_counts_for_nothing(self, kind):
        model = model_of(a=lora(lora_alpha=3), b=lora(lora_alpha=7))
        options = {"density": 1.0} if kind not in ("linear", "cat", "svd") else {}
        found = combined(model, {"a": 1.0, "b": 0.0}, kind, **options)
        assert all(torch.equal(found[k], change(model, "a", k)) for k in found)
        minus = combined(model, {"a": -1.0}, kind, **options)
        same(minus, {k: -M for k, M in found.items()})

    def test_adding_and_taking_away(self):
        model = three()
        model.add_weighted_adapter(["a", "d"], [1, 1], "both", "linear")
        same(combined(model, {"both": 1, "d": -1}), {k: change(model, "a", k) for k in ("0", "2")})
        model.add_weighted_adapter(["both", "d", "a"], [1, -1, 0.5], "back", "linear")
        assert {s.method.r for s in model.get_base_model()._veneer_record.plans["back"].sites} == {2}  # without what cancels

    def test_svd_through_factors_is_the_dense_one(self):
        model = three()
        weights = {"a": 1.0, "b": 2.0, "d": -1.0}
        found = combined(model, weights, "svd", svd_rank=3)
        for layer in found:
            M = sum(w * change(model, n, layer) for n, w in weights.items()).numpy()
            U, s, Vh = np.linalg.svd(M)
            np.testing.assert_allclose(found[layer].numpy(), (U[:, :3] * s[:3]) @ Vh[:3], atol=1e-9)


class TestMethods:
    @pytest.mark.parametrize(
        "config",
        [
            AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["0", "2"]),
            LoHaConfig(r=2, target_modules=["0", "2"]),
            LoKrConfig(r=1, target_modules=["0", "2"]),
        ],
        ids=lambda c: c.PEFT_TYPE,
    )
    def test_low_rank_changes_are_exact(self, config):
        model = model_of(a=lora(), b=config)
        wanted = {k: 0.5 * change(model, "a", k) - 2 * change(model, "b", k) for k in ("0", "2")}
        same(combined(model, {"a": 0.5, "b": -2.0}), wanted)

    @pytest.mark.parametrize("config", [lora(use_dora=True), OFTConfig(oft_block_size=2, target_modules=["0", "2"])], ids=["dora", "oft"])
    def test_full_rank_changes_take_svd(self, config):
        model = model_of(a=lora(), b=config)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        for kind, text in [("linear", "no low rank"), ("cat", "no low rank"), ("ties", "no single product"), ("svd", "give svd_rank")]:
            with pytest.raises((StateError, ConfigError), match=text):
                model.add_weighted_adapter(["a", "b"], [1, 1], "new", kind, density=0.5 if kind == "ties" else None)
        assert list(model.peft_config) == ["a", "b"] and before.keys() == model.state_dict().keys()
        wanted = {k: change(model, "a", k) + change(model, "b", k) for k in ("0", "2")}
        same(combined(model, {"a": 1.0, "b": 1.0}, "svd", svd_rank=12), wanted)

    def test_one_alone_stays_what_it_was(self, tmp_path):
        model = model_of(a=lora(use_dora=True), b=lora())
        model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "same")
        assert model.peft_config["same"].use_dora and torch.equal(change(model, "same"), change(model, "a"))
        model.save_pretrained(tmp_path, selected_adapters=["same"])
        x = torch.randn(2, 12, dtype=torch.float64)
        model.set_adapter("a")
        assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "same")(x), model(x))

    def test_a_weight_on_an_adapter_counts(self):
        model = model_of(a=lora(), b=lora())
        for layer in ("0", "2"):
            model.get_base_model().get_submodule(layer).set_scale("a", 0.5)
        for kind in ("linear", "svd"):
            same(combined(model, {"a": 1.0}, kind), {k: change(model, "a", k) for k in ("0", "2")})


class TestPruning:
    def test_the_largest_are_kept_and_random_ones_keep_the_mean(self):
        t = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
        assert torch.equal(trimmed(t, 0.5), torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        torch.manual_seed(0)
        kept = dropped(torch.ones(200_000), 0.3)
        assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
        assert kept.mean().item() == pytest.approx(1, abs=0.01)

    @pytest.mark.parametrize("election", ["total", "frequency"])
    def test_ties_on_changes_is_the_papers(self, election):
        model = three()
        weights = {"a": 1.0, "b": 2.0, "d": -0.5}
        found = combined(model, weights, "ties_svd", density=0.4, majority_sign_method=election, svd_rank=12)
        own = {n: change(model, n).numpy() for n in weights}
        cut = {n: np.where(np.abs(M) >= np.sort(np.abs(M), axis=None)[-int(0.4 * M.size)], M, 0) for n, M in own.items()}
        votes = sum(np.sign(M) if election == "frequency" else M for M in cut.values())
        elected = np.where(votes >= 0, 1, -1)
        agree = {n: np.sign(M) == elected for n, M in cut.items()}
        mean = sum(w * cut[n] * agree[n] for n, w in weights.items()) / np.maximum(1, sum(a.astype(int) for a in agree.values()))
        np.testing.assert_allclose(found["0"].numpy(), mean, atol=1e-9)

    def test_factors_of_different_scales_vote_by_their_size(self):
        model = model_of(a=lora(lora_alpha=32), b=lora(lora_alpha=2))
        found = combined(model, {"a": 1.0, "b": -3.0}, "ties", density=0.5)["0"]
        factors = {}
        for name, s in (("a", 16.0), ("b", 1.0)):
            p = model.get_base_model().get_submodule("0").veneer[name]["weight"]
            factors[name] = [np.sqrt(s) * t.detach().numpy() for t in (p.lora_A, p.lora_B)]
        merged = []
        for i, sign in ((0, -1), (1, 1)):
            cut = [np.where(np.abs(f[i]) >= np.sort(np.abs(f[i]), axis=None)[-int(0.5 * f[i].size)], f[i], 0) for f in factors.values()]
            elected = np.where(sum(cut) >= 0, 1, -1)
            agree = [np.sign(c) == elected for c in cut]
            merged.append((cut[0] * agree[0] + sign * np.sqrt(3) * cut[1] * agree[1]) / np.maximum(1, agree[0] * 1 + agree[1] * 1))
        np.testing.assert_allclose(found.numpy(), merged[1] @ merged[0], atol=1e-9)

    def test_dare_is_drawn_by_torchs_generator(self):
        model = model_of(a=lora(), b=lora())
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(combined(model, {"a": 1.0, "b": 1.0}, "dare_linear_svd", density=0.5, svd_rank=12)["0"])
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        wanted = 2 * change(model, "a")
        torch.manual_seed(0)
        mean = sum(combined(model, {"a": 2.0}, "dare_linear", density=0.7)["0"] for _ in range(400)) / 400
        assert (mean - wanted).abs().max() < 0.2 * wanted.abs().max()

    def test_clamped_factors(self):
        model = three()
        model.add_weighted_adapter(["a", "d"], [1, 1], "new", "svd", svd_rank=3, svd_clamp=0.9)
        M = (change(model, "a") + change(model, "d")).numpy()
        U, s, Vh = np.linalg.svd(M, full_matrices=False)
        B, A = U[:, :3] * s[:3], Vh[:3]
        p = model.get_base_model().get_submodule("0").veneer["new"]["weight"]
        flips = np.sign((A * p.lora_A.detach().numpy()).sum(1))
        B, A = B * flips, A * flips[:, None]
        top = np.quantile(np.concatenate([B.ravel(), A.ravel()]), 0.9)
        np.testing.assert_allclose(p.lora_B.detach().numpy(), B.clip(-top, top), atol=1e-9)
        np.testing.assert_allclose(p.lora_A.detach().numpy(), A.clip(-top, top), atol=1e-9)


class TestWhatComesAlong:
    def test_own_biases_add_up(self):
        model = model_of(a=lora(lora_bias=True, lora_alpha=3), b=lora(lora_bias=True))
        for kind, options in [("linear", {}), ("svd", {}), ("magnitude_prune", {"density": 1.0})]:
            model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "new", kind, **options)
            own = {n: model.get_base_model().get_submodule("0").equation_of(n, "weight").shift for n in ("a", "b", "new")}
            torch.testing.assert_close(own["new"], own["a"] - 0.5 * own["b"])
            model.delete_adapter("new")

    def test_one_head_comes_along_and_two_are_refused(self, tmp_path):
        model = model_of(a=lora(modules_to_save=["4"]), b=lora(), c=lora(modules_to_save=["4"]))
        model.add_weighted_adapter(["b", "a"], [0.5, 0.5], "new", "linear")
        head = model.get_base_model().get_submodule("4").veneer
        assert torch.equal(head["new"].weight, head["a"].weight) and model.peft_config["new"].modules_to_save == ["4"]
        with pytest.raises(StateError, match="'a' and 'c' each train 4 whole"):
            model.add_weighted_adapter(["a", "c"], [0.5, 0.5], "two", "linear")
        model.add_weighted_adapter(["a", "c"], [0.5, 0.0], "one", "linear")
        with torch.no_grad():
            head["c"].load_state_dict(head["a"].state_dict())
        model.add_weighted_adapter(["a", "c"], [0.5, 0.5], "equal", "linear")
        assert list(model.peft_config) == ["a", "b", "c", "new", "one", "equal"]

    def test_it_is_saved_and_loaded(self, tmp_path):
        model = three()
        model.add_weighted_adapter(["a", "b", "c", "d"], [1, -1, 0.5, 2], "new", "linear")
        assert model.active_adapters == ["a"]
        model.save_pretrained(tmp_path, selected_adapters=["new"])
        model.set_adapter("new")
        x = torch.randn(3, 12, dtype=torch.float64)
        assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "new")(x), model(x))


class TestRefusals:
    @pytest.mark.parametrize(
        ("adapters", "weights", "kind", "options", "text"),
        [
            (["a", "x"], [1, 1], "linear", {}, "no adapter is called 'x'"),
            (["a", "b"], [1], "linear", {}, "one number for each of the 2 adapters, got 1"),
            ([], [], "linear", {}, "name at least one"),
            (["a", "b"], [0, 0], "linear", {}, "all are 0"),
            (["a", "b"], [1, float("nan")], "linear", {}, "the weight of 'b' is nan"),
            (["a", "b"], [1, 1], "lineer", {}, 'Did you mean "linear"'),
            (["a", "b"], [1, 1], "ties", {}, "give density"),
            (["a", "b"], [1, 1], "ties", {"density": 0.0}, "above 0 and up to 1, got 0.0"),
            (["a", "b"], [1, 1], "ties", {"density": 1.5}, "above 0 and up to 1, got 1.5"),
            (["a", "b"], [1, 1], "linear", {"density": 0.5}, "density is for"),
            (["a", "b"], [1, 1], "ties", {"density": 0.5}, "'a' has rank 2, 'b' has rank 4.*ties_svd"),
            (["a", "b"], [1, 1], "cat", {"svd_rank": 2}, "cat takes no svd_rank; use svd"),
            (["a", "b"], [1, 1], "ties", {"svd_rank": 2, "density": 0.5}, "use ties_svd"),
            (["a", "b"], [1, 1], "svd", {"svd_rank": 0}, "svd_rank: a whole number"),
            (["a", "b"], [1, 1], "svd", {"svd_clamp": 2}, "svd_clamp: a quantile"),
            (["a", "b"], [1, 1], "linear", {"svd_clamp": 0.9}, "svd_clamp and svd_driver are for svd"),
            (["a", "b"], [1, 1], "svd", {"svd_driver": "gesvd"}, "cuSOLVER's"),
            (["a", "b"], [1, 1], "svd", {"majority_sign_method": "frequency"}, "for ties"),
            (["a", "b"], [1, 1], "ties", {"density": 0.5, "majority_sign_method": "all"}, "majority_sign_method: 'all'"),
            (["a", "a"], [1, -1], "linear", {}, "changes nothing"),
            (["a", "t"], [1, 1], "linear", {}, "'t' trains the base's own biases"),
        ],
    )
    def test_before_anything_is_changed(self, adapters, weights, kind, options, text):
        model = model_of(a=lora(), b=lora(r=4), t=lora(bias="all"))
        before = model.state_dict().keys()
        with pytest.raises((ConfigError, StateError), match=text):
            model.add_weighted_adapter(adapters, weights, "new", kind, **options)
        assert list(model.peft_config) == ["a", "b", "t"] and model.state_dict().keys() == before

    def test_a_taken_name_and_merged_weights(self):
        model = model_of(a=lora(), b=lora())
        with pytest.raises(ConfigError, match="'b' is attached already"):
            model.add_weighted_adapter(["a", "b"], [1, 1], "b", "linear")
        model.merge_adapter()
        with pytest.raises(StateError, match="merged"):
            model.add_weighted_adapter(["a", "b"], [1, 1], "new", "linear")
