"""A batch in which each sample has its own adapter equals each sample alone, on every row of the table."""

from __future__ import annotations

import pytest
import torch
from table import BY_ID, INSTANCES, randomise
from test_laws import close

from veneer import LoHaConfig, LoraConfig, StateError, strategy

NAMES = ["default", "second", "__base__", "other", "second", "third"]


def with_four(case, dtype=torch.float32):
    """A model with three adapters of the row's method, and one of another."""
    model = case.make(dtype)
    config = LoHaConfig if case.config is LoraConfig else LoraConfig
    for i, name in enumerate(["second", "third", "other"]):
        model.add_adapter(name, config(r=1, **case.kind.target) if name == "other" else case.config(**case.kind.target | case.options))
        model.set_adapter(name)
        randomise(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.mul_(1 + 0.3 * i)
    model.to(dtype).set_adapter(["default", "second", "third", "other"])
    return model


def alone(model, x, name):
    """The output for samples of one adapter, by what is active."""
    if name == "__base__":
        with model.disable_adapter():
            return model(x)
    model.set_adapter(name)
    return model(x)


def gradients(model, x=None):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if x is not None and x.is_floating_point():
        found["x"] = x.grad
    for p in [*model.parameters(), *([] if x is None else [x])]:
        p.grad = None
    return found


@pytest.fixture(params=[i for i in INSTANCES if "bias" not in i.options], ids=lambda i: i.id)
def mixable(request):
    """One row of the table; what trains the base's own biases is refused, see below."""
    return request.param


def test_a_mixed_batch_equals_each_sample_alone(mixable):
    case = mixable
    model, x = with_four(case, torch.float64), case.x(len(NAMES), 5, dtype=torch.float64)
    if x.is_floating_point():
        x.requires_grad_()
    active = list(model.active_adapters)
    y = model(x, adapter_names=NAMES)
    assert model.active_adapters == active
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    mixed = gradients(model, x)
    for i, name in enumerate(NAMES):
        own = alone(model, x[i : i + 1], name)
        close(y[i : i + 1], own, torch.float64)
        if own.requires_grad:
            (own * direction[i : i + 1]).sum().backward()
    model.set_adapter(active)
    apart = gradients(model, x)
    assert {n for n, g in mixed.items() if g.any()} == {n for n, g in apart.items() if g.any()} and len(apart) > 3
    for n, g in apart.items():
        torch.testing.assert_close(mixed[n], g, rtol=1e-9, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}")


def test_in_single_precision_by_every_strategy(mixable):
    case = mixable
    model, x = with_four(case).eval(), case.x(len(NAMES), 5)
    with torch.no_grad():
        mixed = []
        for how in ("auto", "split", "merged", "composed"):
            with strategy(how):
                mixed.append(model(x, adapter_names=NAMES))
        for name in set(NAMES):
            own = [i for i, n in enumerate(NAMES) if n == name]
            expected = alone(model, x[own], name)
            for y in mixed:
                close(y[own], expected)


def test_the_trained_biases_of_one_adapter_are_not_mixed():
    case = BY_ID["lora-trained-bias"]
    model, x = case.make(), case.x(4, 5)
    model.add_adapter("second", LoraConfig(target_modules=["layer"]))
    with pytest.raises(StateError, match="'default' trains the base's biases in place"):
        model(x, adapter_names=["default", "default", "second", "second"])
    assert torch.equal(model(x, adapter_names=["default"] * 4), model(x))
