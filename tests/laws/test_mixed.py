"""A batch in which each sample has its own adapter equals each sample alone, on every row of the table."""

from __future__ import annotations

import pytest
import torch
from packings import PACKINGS
from table import BY_ID, INSTANCES, Model, randomise
from test_laws import close
from torch import nn

from veneer import LoHaConfig, LoraConfig, OFTConfig, StateError, get_peft_model, strategy

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


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: p.id)
def test_samples_on_a_packed_weight(packing):
    configs = [LoraConfig(r=2), LoraConfig(r=2, use_dora=True), LoHaConfig(r=2), OFTConfig(oft_block_size=4)]
    for c in configs:
        c.target_modules = ["layer"]
    model = get_peft_model(Model(packing.pack(nn.Linear(64, 32))), configs[0], "a0")
    names = [f"{x}{i}" for i in range(len(configs)) for x in "ab"]
    for name in names[1:]:
        model.add_adapter(name, configs[int(name[1])])
    model.set_adapter(names)
    randomise(model)
    names = [*names, "__base__", "b1"]
    x = torch.randn(len(names), 5, 64)
    y = model(x, adapter_names=names)
    y.square().sum().backward()
    mixed = gradients(model)
    for i, name in enumerate(names):
        own = alone(model, x[i : i + 1], name)
        close(y[i : i + 1], own)
        if own.requires_grad:
            own.square().sum().backward()
    apart = gradients(model)
    assert mixed.keys() == apart.keys()
    for n, g in apart.items():
        torch.testing.assert_close(mixed[n], g, rtol=1e-3, atol=1e-3 * float(g.abs().max()))
