"""The laws of an adapted layer, each on every row of the table (see conftest)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer import PeftModel, get_peft_model, strategy
from veneer.files import PREFIX, entries
from veneer.layers import Swapped

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 8e-2, torch.float16: 2e-2}


def close(a, b, dtype=torch.float32):
    """Equal to the type's tolerance, relative to the largest number of the expected output."""
    assert a.shape == b.shape and a.dtype == b.dtype
    scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
    torch.testing.assert_close(a.double() / scale, b.double() / scale, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_fresh_adapter_gives_the_base_output_bit_for_bit(case):
    model, x = case.make(random=False), case.x()
    with model.disable_adapter():
        base = model(x)
    y = model(x)
    if case.fresh == "bits":
        assert torch.equal(y, base)
    elif case.fresh == "close":
        close(y, base)
    else:
        assert not torch.allclose(y, base, atol=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("how", ["split", "merged"])
def test_output_is_the_dense_formula(case, dtype, how):
    model, x = case.make(dtype), case.x(dtype=dtype)
    with strategy(how):
        y = model(x)
    close(y, case.output(model, x).to(dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merging_keeps_the_output_and_unmerging_the_weight(case, dtype):
    model, x = case.make(dtype).eval(), case.x(dtype=dtype)
    y = model(x)
    before = {n: (p, p.detach().clone()) for n, p in frozen(model).items()}
    model.merge_adapter(safe_merge=True)
    close(model(x), y, dtype)
    now = frozen(model)
    assert all(not torch.equal(now[f"layer.{w.name}"], before[f"layer.{w.name}"][1]) for w in case.kind.weights)
    model.unmerge_adapter()
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in frozen(model).items())
    assert torch.equal(model(x), y)


def frozen(model):
    """The base model's own parameters."""
    return {n: p for n, p in model.get_base_model().named_parameters() if ".veneer." not in n}


def test_merge_and_unload_leaves_a_plain_model(case):
    model, x = case.make().eval(), case.x()
    y, base = model(x), model.get_base_model()
    keys = set(case.base().state_dict())
    merged = model.merge_and_unload()
    assert merged is base and not any(isinstance(m, Swapped) for m in merged.modules())
    assert set(merged.state_dict()) == keys
    close(merged(x), y)


@pytest.mark.parametrize("how", ["split", "merged"])
def test_gradients_are_those_of_the_dense_formula(case, how):
    model = case.make(torch.float64)
    x, seen = case.x(dtype=torch.float64), case.x(dtype=torch.float64)
    if x.is_floating_point():
        x.requires_grad_(), seen.requires_grad_()
    with strategy(how):
        y = model(x)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    free = {k: t.requires_grad_() for k, t in case.tensors(model).items()}
    biases = {"bias": free["base_layer.bias"]} if "base_layer.bias" in free else None
    (case.output(model, seen, free, biases) * direction).sum().backward()
    if x.is_floating_point():
        torch.testing.assert_close(x.grad, seen.grad, rtol=1e-9, atol=1e-9)
    for key, p in entries(model.get_base_model(), "default", shared=False).items():
        torch.testing.assert_close(
            p.grad, free[key.removeprefix(f"{PREFIX}layer.")].grad, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


STATE = ("importance", "uncertainty", "pruned", "step")


def test_training_changes_the_adapter_and_nothing_frozen(case):
    model = case.make()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (model(case.x()) - 1).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    moving = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n for n in moving if not n.endswith(STATE)} == trainable
    assert all(".veneer." in n or n.endswith("layer.bias") for n in trainable)


def test_the_number_of_trainable_parameters(case):
    assert case.make().get_nb_trainable_parameters()[0] == case.count


def test_save_and_load_give_equal_outputs_bit_for_bit(case, tmp_path):
    model, x = case.make().eval(), case.x()
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(case.base(), tmp_path / "a").eval()
    with torch.no_grad():  # PyTorch chooses other kernels where something requires grad
        assert torch.equal(again(x), model(x))
    again.save_pretrained(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_detaching_gives_back_the_untouched_model(case):
    base = case.base()
    next(base.layer.parameters()).requires_grad_(False)
    before = {n: (p, p.detach().clone(), p.requires_grad) for n, p in base.named_parameters()}
    classes = [type(m) for m in base.modules()]
    model = get_peft_model(base, case.config(**case.kind.target | case.options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    assert model.unload() is base
    assert [type(m) for m in base.modules()] == classes
    assert list(base.state_dict()) == list(before)
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) and p.requires_grad == before[n][2] for n, p in base.named_parameters())
    assert not any(k.startswith(("_veneer", "veneer")) for m in base.modules() for k in m.__dict__)


def test_disabling_gives_the_base_output(case):
    model, x = case.make().eval(), case.x()
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    plain = case.base().requires_grad_(False).eval()(x)
    assert torch.equal(base, plain) and not torch.equal(y, base) and torch.equal(model(x), y)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(case, copied):
    model, x = case.make(), case.x()
    twin = copied(model)
    assert torch.equal(twin(x), model(x)) and type(twin) is type(model)
    randomise_differently(twin)
    assert not torch.equal(twin(x), model(x))


def randomise_differently(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5)


def test_moving_to_another_type_and_back(case):
    model, x = case.make(), case.x()
    close(model.double()(x.double() if x.is_floating_point() else x), case.output(model, x), torch.float32)
    assert model.float()(x).dtype is torch.float32


def test_half_precision_bases_get_float32_adapters(case):
    for dtype in (torch.bfloat16, torch.float16):
        model = case.make(dtype)
        adapters = [p for n, p in model.named_parameters() if ".veneer." in n]
        assert adapters and all(p.dtype is torch.float32 for p in adapters)
        assert model(case.x(dtype=dtype)).dtype is dtype


def test_autocast_gives_the_base_type(case):
    model, x = case.make(), case.x()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        with model.disable_adapter():
            assert y.dtype is model(x).dtype
    close(y.float(), case.output(model, x).float(), torch.bfloat16)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(0, 4), min_size=0, max_size=4), contiguous=st.booleans())
def test_any_leading_shape(case, shape, contiguous):
    model = case.make()
    x = case.kind.feed(shape)
    if not contiguous:
        x = torch.stack([x, x], -1)[..., 0]
    y = model(x)
    close(y, case.output(model, x).float())
    y.sum().backward()


def test_compiles_whole_and_once(case):
    model, x = case.make(), case.x(6, 3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        y = compiled(x)
        y.sum().backward()
        close(y, model(x))
    assert counter.frame_count == 1


def test_gradient_checkpointing_gives_the_same_gradients(case):
    from torch.utils.checkpoint import checkpoint

    grads = []
    for reentrant in (None, False, True):
        model, x = case.make(), case.x()
        if not x.is_floating_point():
            if reentrant:
                continue  # re-entrant checkpoints need an input that requires grad
        else:
            x.requires_grad_()
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
