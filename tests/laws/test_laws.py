"""The laws of an adapted layer, each on every row of the table (see conftest)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer import PeftModel, get_peft_model, strategy
from veneer.files import PREFIX, entries
from veneer.layers import AdaptedLayer

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def close(a, b, dtype=torch.float32):
    assert a.shape == b.shape and a.dtype == b.dtype
    torch.testing.assert_close(a.double(), b.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def tensors(model, dtype=torch.float64):
    """The adapter's numbers by the method's own names, as the file has them."""
    return {k.removeprefix(f"{PREFIX}layer."): t.detach().to(dtype) for k, t in entries(model.get_base_model(), "default").items()}


def dense_of(case, model, values=None):
    layer = model.get_base_model().layer
    return case.dense(layer.weight.detach().double(), values or tensors(model))


def output_of(case, model, x, values=None):
    bias = model.get_base_model().layer.bias
    return F.linear(x.double(), dense_of(case, model, values), None if bias is None else bias.double())


def test_a_fresh_adapter_gives_the_base_output_bit_for_bit(case):
    model, x = case.make(random=False), case.x()
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base) is case.fresh_is_base
    if not case.fresh_is_base and case.options.get("init_lora_weights") == "orthogonal":
        close(model(x), base)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("how", ["split", "merged"])
def test_output_is_the_dense_formula(case, dtype, how):
    model, x = case.make(dtype), case.x(dtype=dtype)
    with strategy(how):
        y = model(x)
    close(y, output_of(case, model, x).to(dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merging_keeps_the_output_and_unmerging_the_weight(case, dtype):
    model, x = case.make(dtype).eval(), case.x(dtype=dtype)
    layer, y = model.get_base_model().layer, model(x)
    before, tensor = layer.weight.detach().clone(), layer.weight
    model.merge_adapter(safe_merge=True)
    close(model(x), y, dtype)
    assert not torch.equal(layer.weight, before)
    model.unmerge_adapter()
    assert layer.weight is tensor and torch.equal(tensor, before)
    assert torch.equal(model(x), y)


def test_merge_and_unload_leaves_a_plain_model(case):
    model, x = case.make().eval(), case.x()
    y, base = model(x), model.get_base_model()
    keys = set(case.base().state_dict())
    merged = model.merge_and_unload()
    assert merged is base and not any(isinstance(m, AdaptedLayer) for m in merged.modules())
    assert set(merged.state_dict()) == keys
    close(merged(x), y)


@pytest.mark.parametrize("how", ["split", "merged"])
def test_gradients_are_those_of_the_dense_formula(case, how):
    model = case.make(torch.float64)
    x, seen = case.x(dtype=torch.float64).requires_grad_(), case.x(dtype=torch.float64).requires_grad_()
    direction = torch.randn(4, 5, case.in_out[1], dtype=torch.float64)
    with strategy(how):
        (model(x) * direction).sum().backward()
    free = {k: t.clone().requires_grad_() for k, t in tensors(model).items()}
    bias = free.get("base_layer.bias", model.get_base_model().layer.bias)
    (F.linear(seen, dense_of(case, model, free), None if bias is None else bias) * direction).sum().backward()
    torch.testing.assert_close(x.grad, seen.grad, rtol=1e-10, atol=1e-10)
    for key, p in entries(model.get_base_model(), "default").items():
        torch.testing.assert_close(
            p.grad, free[key.removeprefix(f"{PREFIX}layer.")].grad, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_training_changes_the_adapter_and_nothing_frozen(case):
    model = case.make(random=False)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(case.x()) - 1).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    assert {n for n in before if not torch.equal(before[n], after[n])} == trainable
    assert all(".veneer." in n or n.endswith("layer.bias") for n in trainable)


def test_the_number_of_trainable_parameters(case):
    assert case.make().get_nb_trainable_parameters()[0] == case.count


def test_save_and_load_give_equal_outputs_bit_for_bit(case, tmp_path):
    model, x = case.make().eval(), case.x()
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(type(model.get_base_model()).of(case.base()), tmp_path / "a").eval()
    assert torch.equal(again(x), model(x))
    again.save_pretrained(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_detaching_gives_back_the_untouched_model(case):
    base = case.make().get_base_model()
    base = type(base).of(case.base())
    base.layer.weight.requires_grad_(False)
    before = {n: (p, p.detach().clone(), p.requires_grad) for n, p in base.named_parameters()}
    classes = [type(m) for m in base.modules()]
    model = get_peft_model(base, case.config(target_modules=["layer"], **case.options))
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
    plain = case.base().eval()["layer"](x)
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
    close(model.double()(x.double()), output_of(case, model, x), torch.float32)
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
    close(y.float(), output_of(case, model, x).float(), torch.bfloat16)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(0, 4), min_size=0, max_size=4), contiguous=st.booleans())
def test_any_leading_shape(case, shape, contiguous):
    model = case.make()
    x = torch.randn(*shape, case.in_out[0])
    if not contiguous and len(shape) > 1:
        x = x.transpose(0, 1)
    y = model(x)
    close(y, output_of(case, model, x).float())
    y.sum().backward()


def test_compiles_whole_and_once(case):
    model, x = case.make(), case.x(6)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        y = compiled(x)
        y.sum().backward()
        close(y, model(x))
    assert counter.frame_count == 1


def test_dropout_reaches_only_the_change_and_only_in_training(case):
    model, x = case.make(lora_dropout=0.5), case.x()
    layer = model.get_base_model().layer
    plain, base = model.eval()(x), F.linear(x, layer.weight, layer.bias)
    model.train()
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    change = F.linear(dropped.double(), dense_of(case, model) - layer.weight.double())
    close(y, (base.double() + change).float())
    assert not torch.equal(y, plain) and torch.equal(model.eval()(x), plain)


def test_gradient_checkpointing_gives_the_same_gradients(case):
    from torch.utils.checkpoint import checkpoint

    grads = []
    for reentrant in (None, False, True):
        model, x = case.make(), case.x().requires_grad_()
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
