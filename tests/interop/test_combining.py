"""Combinations beside HF PEFT's, live: equal where its are right, and the right value where they are not."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn

import veneer

BOTH = ["first", "last"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 12)
        self.first, self.conv, self.last = nn.Linear(12, 16), nn.Conv2d(1, 4, 3, padding=1), nn.Linear(16, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(self.words(ids)))
        return self.last(h + self.conv(h.unsqueeze(1)).mean(1))


IDS = torch.arange(9).view(3, 3)


def base() -> nn.Module:
    torch.manual_seed(1)
    return Net().double().eval()


def saved(tmp_path, configs):
    """The directories of adapters with random numbers."""
    found = []
    for i, config in enumerate(configs):
        model = veneer.get_peft_model(base(), veneer.LoraConfig(**config))
        generator = torch.Generator().manual_seed(20 + i)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)
        model.save_pretrained(tmp_path / str(i))
        found.append(tmp_path / str(i))
    return found


def held(library, places, dtype=torch.float64):
    model = library.PeftModel.from_pretrained(base(), places[0], "a0", autocast_adapter_dtype=False)
    for i, place in enumerate(places[1:], 1):
        model.load_adapter(place, f"a{i}", autocast_adapter_dtype=False)
    return model.eval()


def change(model, layer):
    """W' − W of the combination in the layer's own shape."""
    with torch.no_grad():
        return model.get_submodule(f"base_model.model.{layer}").get_delta_weight("new")


def both(tmp_path, configs, weights, kind, **options):
    """(Veneer's model, HF PEFT's), each with the combination."""
    places = saved(tmp_path, configs)
    found = []
    for library in (veneer, peft):
        model = held(library, places)
        names = [f"a{i}" for i in range(len(places))]
        if library is peft:
            seeded(model.base_model)
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(names, weights, "new", kind, **options)
        found.append(model)
    return found


def seeded(model):
    """Seed once more behind the first values of HF PEFT's new adapter, which it draws before it combines."""
    inject = model.inject_adapter

    def then_seed(*args, **kwargs):
        inject(*args, **kwargs)
        torch.manual_seed(5)

    model.inject_adapter = then_seed


def same(pair, layers=BOTH, tolerance=1e-6):
    for layer in layers:
        torch.testing.assert_close(change(pair[0], layer), change(pair[1], layer).double(), rtol=tolerance, atol=tolerance)


EQUAL = [{"r": 4, "lora_alpha": 6, "target_modules": BOTH}] * 3
STABLE = [c | {"use_rslora": True} for c in EQUAL]
OTHER_SCALES = [{"r": 4, "lora_alpha": a, "target_modules": BOTH} for a in (6, 16, 1)]
OTHER_RANKS = [{"r": r, "lora_alpha": 6, "target_modules": BOTH, "use_rslora": r == 2} for r in (4, 2, 3)]
CONV_AND_WORDS = [{"r": 2, "lora_alpha": 3, "target_modules": ["words", "conv", "last"]}] * 2
PRUNED = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("configs", [EQUAL, OTHER_SCALES, OTHER_RANKS], ids=["equal", "scales", "ranks"])
def test_cat_and_svd(configs, tmp_path):
    weights = [1.0, 0.5, -0.75]
    same(both(tmp_path, configs, weights, "cat"))
    same(both(tmp_path, configs, weights, "svd", svd_rank=3))
    same(both(tmp_path, configs, weights, "svd"))


@pytest.mark.parametrize("kind", PRUNED)
def test_pruned_factors_of_one_scale(kind, tmp_path):
    for election in ["total", "frequency"] if "ties" in kind else ["total"]:
        same(both(tmp_path / election, EQUAL, [1.0, 0.5, -0.75], kind, density=0.5, majority_sign_method=election))


@pytest.mark.parametrize(("kind", "rank", "options"), [("cat", 12, {}), ("svd", 4, {}), ("magnitude_prune", 4, {"density": 0.5})])
def test_hf_peft_multiplies_rank_stabilised_adapters_once_more(kind, rank, options, tmp_path):
    """Its new adapter keeps use_rslora with alpha = r, so that all of it is √r times too large."""
    ours, theirs = both(tmp_path, STABLE, [1.0, 0.5, -0.75], kind, **options)
    if kind == "cat":
        layer = ours.get_base_model().last
        with torch.no_grad():
            wanted = sum(w * layer.get_delta_weight(f"a{i}") for i, w in enumerate([1.0, 0.5, -0.75]))
        torch.testing.assert_close(change(ours, "last"), wanted)
    for layer in BOTH:
        torch.testing.assert_close(change(theirs, layer).double() / rank**0.5, change(ours, layer), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["dare_linear", "magnitude_prune"])
def test_pruned_factors_without_a_vote_may_have_any_scales(kind, tmp_path):
    same(both(tmp_path, OTHER_SCALES, [1.0, 0.5, -0.75], kind, density=0.5))


@pytest.mark.parametrize("kind", [f"{k}_svd" for k in PRUNED])
def test_pruned_changes(kind, tmp_path):
    same(both(tmp_path, OTHER_RANKS, [1.0, 0.5, -0.75], kind, density=0.5, svd_rank=3))


def test_convolutions_and_embeddings(tmp_path):
    for kind, options in [("cat", {}), ("svd", {"svd_rank": 2}), ("magnitude_prune", {"density": 0.5})]:
        layers = ["words", "last"] if kind == "cat" else ["words", "conv", "last"]
        same(both(tmp_path, CONV_AND_WORDS, [1.0, -0.5], kind, **options), layers)


def test_linear_is_the_sum_of_changes_and_hf_peft_adds_products_between_adapters(tmp_path):
    ours, theirs = both(tmp_path, EQUAL[:2], [1.0, 0.5], "linear")
    layer = ours.get_base_model().last
    factors = [(layer.veneer[n]["weight"].lora_A, layer.veneer[n]["weight"].lora_B) for n in ("a0", "a1")]
    (A, B), (C, D) = factors
    s = 1.5
    with torch.no_grad():
        torch.testing.assert_close(change(ours, "last"), s * (B @ A + 0.5 * D @ C))
        crossed = 0.5**0.5 * s * (B @ C + D @ A)
        torch.testing.assert_close(change(theirs, "last"), s * (B @ A + 0.5 * D @ C) + crossed, rtol=1e-5, atol=1e-6)


def test_hf_peft_votes_without_the_scales(tmp_path):
    """An adapter of scale 1/4 outvotes one of scale 4 there; the sign of what counts sixteen times as much should win."""
    ours, theirs = both(tmp_path, OTHER_SCALES, [1.0, 1.0, 1.0], "ties", density=1.0)
    layer = ours.get_base_model().last
    found = []
    for factor in ("lora_A", "lora_B"):
        own = [(a / 4) ** 0.5 * getattr(layer.veneer[f"a{i}"]["weight"], factor).detach() for i, a in enumerate((6, 16, 1))]
        elected = torch.where(sum(own) >= 0, 1.0, -1.0)
        agree = [t.sign() == elected for t in own]
        found.append(sum(t * a for t, a in zip(own, agree, strict=True)) / sum(a.double() for a in agree).clamp(min=1))
    torch.testing.assert_close(change(ours, "last"), found[1] @ found[0])
    assert not torch.allclose(change(theirs, "last").double(), change(ours, "last"), atol=1e-2)


def test_an_adapter_of_weight_zero_takes_no_share_as_it_does_in_hf_peft(tmp_path):
    ours, theirs = both(tmp_path, EQUAL[:2], [1.0, 0.0], "ties", density=1.0)
    model = ours.get_base_model()
    with torch.no_grad():
        assert torch.equal(change(ours, "last"), model.last.get_delta_weight("a0"))
    assert not torch.allclose(change(theirs, "last").double(), change(ours, "last"), atol=1e-2)


def test_dora_is_combined_as_what_it_does_and_hf_peft_drops_its_lengths(tmp_path):
    ours, theirs = both(tmp_path, [c | {"use_dora": True} for c in EQUAL[:2]], [1.0, 0.5], "svd", svd_rank=5)
    layer = ours.get_base_model().last
    with torch.no_grad():
        wanted = layer.get_delta_weight("a0") + 0.5 * layer.get_delta_weight("a1")
    torch.testing.assert_close(change(ours, "last"), wanted)
    assert not torch.allclose(change(theirs, "last").double(), wanted, atol=1e-2)


@pytest.mark.parametrize(
    ("configs", "kind"),
    [
        ([{"r": 4, "target_modules": BOTH}, {"r": 2, "target_modules": ["last"]}], "linear"),
        ([{"r": 2, "rank_pattern": {"last": 3}, "target_modules": BOTH}, {"r": 3, "use_rslora": True, "target_modules": BOTH}], "cat"),
        ([{"r": 2, "target_modules": BOTH, "lora_bias": True}, {"r": 2, "target_modules": ["first"]}], "linear"),
        ([{"r": 4, "use_dora": True, "target_modules": BOTH}, {"r": 2, "target_modules": BOTH}], "svd"),
        (CONV_AND_WORDS, "linear"),
    ],
    ids=["layers", "patterns", "biases", "dora", "kinds"],
)
def test_hf_peft_loads_the_result_with_equal_outputs(configs, kind, tmp_path):
    model = held(veneer, saved(tmp_path, configs))
    model.add_weighted_adapter(["a0", "a1"], [1.0, -0.5], "new", kind, svd_rank=4 if kind == "svd" else None)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    model.set_adapter("new")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "new", autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-9, atol=1e-9)
