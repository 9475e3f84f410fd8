"""A combination's change is the weighted sum of its adapters' changes, on every row of the table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer import VeneerError
from veneer.inject import adapted_modules

DTYPE = torch.float64
SIZE = st.floats(-3, 3, width=16).filter(lambda w: abs(w) > 0.05)


def two(case):
    """The row's model with a second adapter of the same configuration, both with random numbers."""
    model = case.make(DTYPE)
    own = case.options | ({"bias": "none"} if "bias" in case.options else {})
    model.add_adapter("other", case.config(**case.kind.target | own))
    generator = torch.Generator().manual_seed(23)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".other." in name and p.is_floating_point():
                near_one = name.endswith(("magnitude_vector", "boft_s", ".l"))
                noise = torch.randn(p.shape, generator=generator, dtype=DTYPE)
                p.copy_(p * (1 + 0.3 * noise) if near_one else 0.4 * noise)
    return model.eval()


def changes(model, name):
    """W' − W of every weight, and b' − b, as dense numbers."""
    found = {}
    with torch.no_grad():
        for path, module in adapted_modules(model):
            for tensor, kind in module.veneer_kinds.items():
                e = module.equation_of(name, tensor)
                if e is None:
                    continue
                W, b = kind.matrix(module), kind.bias(module)
                found[path, tensor] = (e.dense() - W).numpy()
                after = e.bias(b)
                if after is not b and after is not None:
                    found[path, tensor, "bias"] = (after if b is None else after - b).numpy()
    return found


def weighted(model, weights):
    each = {n: changes(model, n) for n in weights}
    return {key: sum(w * each[n].get(key, 0) for n, w in weights.items()) for key in {k for e in each.values() for k in e}}


def expect(found, wanted, tolerance=1e-9):
    for key, M in wanted.items():
        got = found.get(key, np.zeros_like(M))
        assert np.abs(got - M).max() <= tolerance * max(1.0, np.abs(M).max()), key


def combine(model, name, weights, kind, **options):
    """Whether the type can do it; where it cannot, nothing changed."""
    try:
        model.add_weighted_adapter(list(weights), list(weights.values()), name, kind, **options)
    except VeneerError as e:
        assert list(model.peft_config) == ["default", "other"], e
        return str(e)
    return None


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(a=SIZE, b=SIZE, kind=st.sampled_from(["linear", "cat"]))
def test_the_sum_is_exact_or_refused(case, a, b, kind):
    model = two(case)
    why = combine(model, "sum", {"default": a, "other": b}, kind)
    if why is not None:
        assert "combination_type='svd'" in why or "plain LoRA's file" in why or "groups" in why or "biases in place" in why, why
        if "combination_type='svd'" in why:
            assert (
                case.config.__name__ in ("BOFTConfig", "FourierFTConfig", "IA3Config", "OFTConfig")
                or case.options.get("use_dora")
                or any(w.where.k > 1 for w in case.kind.weights)
            )
        return
    expect(changes(model, "sum"), weighted(model, {"default": a, "other": b}))
    assert model.active_adapters == ["default"] and not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)


def test_svd_is_the_best_change_of_its_rank(case):
    model = two(case)
    why = combine(model, "best", {"default": 1.5, "other": -0.5}, "svd", svd_rank=2)
    if why is not None:
        assert "plain LoRA's file" in why or "groups" in why or "biases in place" in why, why
        return
    found = changes(model, "best")
    for key, M in weighted(model, {"default": 1.5, "other": -0.5}).items():
        if key[-1] == "bias":
            expect(found, {key: M})
            continue
        U, s, Vh = np.linalg.svd(M, full_matrices=False)
        best = (U[:, :2] * s[:2]) @ Vh[:2]
        assert np.linalg.matrix_rank(found[key], tol=1e-8) <= 2
        assert np.abs(found[key] - best).max() <= 1e-7 * max(1, np.abs(best).max())


@pytest.mark.parametrize("kind", ["svd", "linear"])
def test_one_adapter_of_weight_one_is_itself(case, kind):
    model = two(case)
    why = combine(model, "same", {"default": 1.0, "other": 0.0}, kind)
    if why is not None:
        assert "biases in place" in why
        return
    wanted = changes(model, "default")
    found = changes(model, "same")
    assert found.keys() == wanted.keys() and all(np.array_equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("kind", ["ties_svd", "dare_linear_svd"])
def test_nothing_pruned_is_the_plain_combination(case, kind):
    model = two(case)
    weights = {"default": 1.5, "other": -0.5}
    full = 64
    why = combine(model, "pruned", weights, kind, density=1.0, svd_rank=full)
    if why is not None:
        assert "plain LoRA's file" in why or "groups" in why or "biases in place" in why, why
        return
    found = changes(model, "pruned")
    if kind != "ties_svd":
        expect(found, weighted(model, weights), 1e-7)
        return
    a, b = changes(model, "default"), changes(model, "other")
    for key in a:
        sign = np.where(a[key] + b[key] >= 0, 1, -1)
        agree = [np.sign(t) == sign for t in (a[key], b[key])]
        mean = (1.5 * a[key] * agree[0] - 0.5 * b[key] * agree[1]) / np.maximum(1, agree[0] * 1 + agree[1] * 1)
        expect(found, {key: mean}, 1e-7)
