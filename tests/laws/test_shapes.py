"""Every method on linear layers and convolutions of any size, and numerical gradients where other libraries have had wrong ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from places import conv, linear
from table import BY_ID, randomise
from test_laws import close
from torch import nn

from veneer import BOFTConfig, OFTConfig, TargetError, get_peft_model, strategy

METHODS = ["lora", "dora", "adalora", "loha", "lokr", "boft", "ia3", "vera", "hra", "fourierft"]


def same_both_ways(case):
    model, x = case.make(), case.x()
    expected = case.output(model, x).float()
    for how in ("split", "merged"):
        with strategy(how):
            close(model(x), expected)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(in_=st.integers(2, 40), out=st.integers(2, 40), bias=st.booleans())
def test_any_linear(method, in_, out, bias):
    assume(method != "boft" or in_ % 4 == 0)
    import dense as d

    row = BY_ID[f"{method}-linear"]
    dense = d.vera(4, 3, in_, out) if method == "vera" else row.dense
    options = row.options | ({"n_frequency": min(9, in_ * out)} if method == "fourierft" else {})
    same_both_ways(replace(row, kind=linear(in_, out, bias=bias), dense=dense, options=options))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "loha", "lokr", "ia3", "hra"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    channels=st.integers(1, 3),
    out=st.integers(1, 3),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
def test_any_convolution(method, channels, out, groups, kernel, stride, padding, dilation, mode):
    kind = conv(
        nn.Conv2d, channels * groups, out * groups, kernel, (6, 7), groups=groups, stride=stride, padding=padding, dilation=dilation, padding_mode=mode
    )  # fmt: skip
    same_both_ways(replace(BY_ID[f"{method}-conv2d"], kind=kind))


@pytest.mark.parametrize(
    "row",
    ["loha-tucker", "loha-tucker-1d", "lokr-tucker", "lokr-full-1d", "loha-conv2d-groups", "boft-conv2d", "oft-conv2d", "dora-conv2d"],
)
def test_convolution_gradients_are_those_of_finite_differences(row):
    case = BY_ID[row]
    model, x = case.make(torch.float64), case.x(1, dtype=torch.float64).requires_grad_()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    values = [p for p in model.parameters() if p.requires_grad]
    if row.startswith("dora"):
        # The norm counts as a constant, so only the input and the lengths have gradients that differences can see.
        kept = [i for i, n in enumerate(names) if "magnitude" in n]
        names, values = [names[i] for i in kept], [values[i] for i in kept]

    def run(x, *new):
        return torch.func.functional_call(model, dict(zip(names, new, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *[v.detach().requires_grad_() for v in values]), fast_mode=True)


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["0"]), 1e-2),
        # The series holds only while its blocks are small, which a small learning rate keeps them.
        (OFTConfig(oft_block_size=8, target_modules=["0"]), 2e-4),
        (BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["0"]), 1e-2),
    ],
    ids=["oft", "oft-neumann", "boft"],
)
def test_rotations_are_orthogonal_after_training(config, rate):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32, bias=False)), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    target = torch.linalg.qr(torch.randn(32, 32))[0]
    for _ in range(60):
        x = torch.randn(64, 32)
        (model(x) - x @ target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = model.get_base_model()[0]
    ((equation, _),) = layer.equations("weight")
    R = equation.R.dense().detach()
    assert (R - torch.eye(32)).abs().max() > 10 * rate
    torch.testing.assert_close(R @ R.mT, torch.eye(32), rtol=0, atol=1e-5)


def test_constrained_blocks_stay_within_the_bound_while_training():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 8)), OFTConfig(oft_block_size=4, coft=True, eps=0.05, target_modules=["0"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(5):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    stored = model.get_base_model()[0].veneer["default"]["weight"].oft_R
    sizes = (2 * stored.detach().square().sum(-1)).sqrt()
    assert (sizes <= 0.05 / 2 * (1 + 1e-5)).all() and (sizes > 0.02).any()


def test_what_does_not_divide_is_refused_before_anything_is_changed():
    model = nn.Sequential(nn.Linear(10, 4))
    with pytest.raises(TargetError, match="rotates 10 features, which blocks of 4 do not divide; divisors are 1, 2, 5, 10"):
        get_peft_model(model, BOFTConfig(boft_block_size=4, target_modules=["0"]))
    assert type(model[0]) is nn.Linear
    with pytest.raises(TargetError, match="3 butterfly factors need an even block size"):
        get_peft_model(nn.Sequential(nn.Linear(12, 4)), BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["0"]))


def test_a_rank_above_the_weights_own_is_refused_where_factors_come_from_it():
    from veneer import LoraConfig

    with pytest.raises(TargetError, match="0 is 4 × 10, and init_lora_weights='pissa' takes r=5 directions from it"):
        get_peft_model(nn.Sequential(nn.Linear(10, 4)), LoraConfig(r=5, init_lora_weights="pissa", target_modules=["0"]))


def test_randomise_leaves_nothing_at_its_start():
    """The laws would be empty on adapters that change nothing."""
    for case in BY_ID.values():
        model = case.make(random=False)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        randomise(model)
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad), case.id
