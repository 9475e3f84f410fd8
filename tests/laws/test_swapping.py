"""What a method says of numbers that change nothing, that may be added, and that take the scale (`Parameter.still`, `grows`, `scaled`): each on every row of the table."""

from __future__ import annotations

import copy

import torch

from veneer.inject import adapter_of, record
from veneer.layers import Frozen
from veneer.operators import Adapted

DTYPE = torch.float64


def parts(case, *, random=True):
    """(method, form, W, values) of every adapted weight, with random numbers."""
    model = case.make(DTYPE, random=random).get_base_model()
    for site in record(model).plans["default"].sites:
        module, adapter = model.get_submodule(site.module), adapter_of(model, site, "default")
        yield site.method, adapter, Adapted(Frozen(site.kind, module)), adapter.values()


def dense(method, W, p):
    with torch.no_grad():
        found = method.equation(W, p)
        bias = torch.ones(W.form.out, dtype=DTYPE)
        return found.dense(), found.bias(bias)


def test_numbers_that_stand_still_give_the_frozen_weight(case):
    for method, adapter, W, _ in parts(case):
        specs = adapter.specs
        if any(s.still is None for s in specs):
            assert case.config().PEFT_TYPE == "HRA"
            continue
        with torch.no_grad():
            for last in (False, True):
                for spec in specs:
                    if spec.key:
                        spec.still(getattr(adapter, spec.name))
                if not last:
                    method.finish(W, adapter.values())
        M, b = dense(method, W, adapter.values())
        torch.testing.assert_close(M, W.W.dense(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b, torch.ones_like(b), rtol=1e-12, atol=1e-12)


def test_more_of_what_stands_still_changes_nothing(case):
    for method, adapter, W, p in parts(case):
        growing = [s for s in adapter.specs if s.grows and s.key]
        if not growing or getattr(method, "_from_W", False):
            continue
        more = copy.copy(p)
        for spec in growing:
            t = getattr(p, spec.name)
            shape = [n + 2 if d in spec.grows else n for d, n in enumerate(t.shape)]
            whole = torch.empty(shape, dtype=t.dtype)
            spec.still(whole)
            whole[tuple(slice(n) for n in t.shape)] = t
            setattr(more, spec.name, whole)
        if hasattr(p, "places"):
            free = sorted(set(range(W.form.out * W.form.in_)) - set(p.places.flatten().tolist()))[:2]
            more.places = torch.cat([p.places, torch.tensor(free).expand(*p.places.shape[:-1], 2)], -1)
        try:
            found = dense(method, W, more)
        except RuntimeError:
            assert hasattr(p, "boft_R")  # so many factors need more blocks than there are
            continue
        for a, b in zip(found, dense(method, W, p), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_factor_of_the_scale_can_be_put_into_a_tensor(case):
    for method, adapter, W, p in parts(case):
        if method.scale is None:
            continue
        scaled = copy.copy(p)
        for spec in adapter.specs:
            if spec.scaled:
                setattr(scaled, spec.name, getattr(p, spec.name) * 3.5)
        for a, b in zip(dense(method, W, scaled), dense(method.weighted(3.5), W, p), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_tensor_is_laid_as_it_was_viewed(case):
    for _, adapter, _, _ in parts(case):
        for spec in adapter.specs:
            t = getattr(adapter, spec.name)
            assert torch.equal(spec.laid(spec.view(t)), t)
