"""The laws of packed weights: every method on every packing, held to the dense formula on the unpacked weight."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from packings import PACKINGS, RARE, Packing
from places import linear
from table import Instance, Model, every_method, randomise
from torch import Tensor, nn

from veneer import LoraConfig, PeftModel, StateError, VeraConfig, get_peft_model
from veneer.layers.storages import PACKED, storage_of

IN, OUT = 64, 32
CASES = every_method("packed", linear(IN, OUT))
NEEDS_W = {"dora-packed": 1}
"""How often a method unpacks the weight, ever: DoRA once, for the lengths of its rows."""


@pytest.fixture(params=PACKINGS, ids=lambda p: p.id)
def packing(request) -> Packing:
    return request.param


@pytest.fixture(params=CASES, ids=lambda i: i.id)
def method(request) -> Instance:
    return request.param


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The name of the storage for every time that a weight is unpacked."""
    found: list[str] = []
    for cls in {type(s) for s in PACKED}:

        def counted(self, layer, tensor, read=cls.read):
            found.append(self.name)
            return read(self, layer, tensor)

        monkeypatch.setattr(cls, "read", counted)
    return found


def plain(seed: int = 7) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Linear(IN, OUT)
        with torch.no_grad():
            layer.weight.normal_(0, 0.5)
    return layer


def inputs(*lead: int) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return torch.randn(*(lead or (4, 5)), IN)


def make(method: Instance, packing: Packing, *, random: bool = True, **options) -> PeftModel:
    torch.manual_seed(5)
    model = get_peft_model(Model(packing.pack(plain())), method.config(target_modules=["layer"], **method.options | options))
    if random:
        randomise(model)
    return model


def dense(method: Instance, packing: Packing, model: PeftModel, values: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """W' and b' by the formula, in float64, of the weight as the package itself reads it."""
    layer = model.get_base_model().layer
    t = method.tensors(model) if values is None else values
    W, b = packing.read(layer).double(), layer.bias.detach().double()
    (weight,) = method.kind.weights
    return method.dense(W, t, weight.where), b * t["ia3_l"].flatten() if method.scales_bias else b


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-9)


def test_output_and_gradients_are_those_of_the_dense_formula_and_nothing_is_unpacked(packing, method, reads):
    model, x = make(method, packing).train(), inputs().requires_grad_()
    y = model(x)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    assert len(reads) == NEEDS_W.get(method.id, 0)
    free = {k: t.requires_grad_() for k, t in method.tensors(model).items()}
    seen = x.detach().double().requires_grad_()
    W, b = dense(method, packing, model, free)
    formula = seen @ W.T + b
    (formula * direction).sum().backward()
    assert y.dtype is torch.float32
    close(y, formula), close(x.grad, seen.grad)
    layer = model.get_base_model().layer
    for key, tensor in layer.veneer["default"].weight.file_tensors().items():
        if free[key].grad is not None:
            close(tensor.grad, free[key].grad, 1e-4)
    model.eval()
    with torch.no_grad():
        close(model(x.detach()), formula.detach(), 2e-2 if packing.rounds_activations else 2e-5)
    assert len(reads) == NEEDS_W.get(method.id, 0)


def test_a_fresh_adapter_gives_the_base_output(packing, method):
    model, x = make(method, packing, random=False).eval(), inputs()
    with torch.no_grad():
        y = model(x)
        with model.disable_adapter():
            base = model(x)
        assert torch.equal(base, packing.pack(plain()).eval()(x))
    if method.fresh == "bits":
        assert torch.equal(y, base)
    elif method.fresh == "close":
        close(y, base, 2e-2 if packing.rounds_activations else 2e-5)
    else:
        assert not torch.allclose(y, base, atol=1e-3)


def test_save_and_load_on_a_freshly_packed_base_bit_for_bit(packing, method, tmp_path):
    model, x = make(method, packing).eval(), inputs()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Model(packing.pack(plain())), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_merged_is_the_packed_formula_and_unmerged_the_very_weight(packing, method):
    model, x = make(method, packing).eval(), inputs()
    layer = model.get_base_model().layer
    with torch.no_grad():
        y = model(x)
    before, bytes_before = layer.weight, [t.clone() for t in packing.tensors(layer)]
    W, b = dense(method, packing, model)
    (row,) = model.merge_adapter().weights
    expected = packing.pack(_holding(W, b))
    assert type(layer.weight) is type(before) and layer.weight is not before
    close(packing.read(layer), packing.read(expected), 0.05)  # a number between two steps may fall to either
    assert float((packing.read(layer) - W).norm()) <= 1.02 * float((packing.read(expected) - W).norm()) + 1e-6
    with torch.no_grad():
        close(model(x), layer.base_forward(x), 0)
    change, error = (W - packing.read(packing.pack(plain()))).norm(), (packing.read(layer) - W).norm()
    assert row.change == pytest.approx(float(change), rel=1e-3) and row.error == pytest.approx(float(error), rel=1e-2, abs=1e-5)
    assert row.norm == pytest.approx(float(W.norm()), rel=1e-4) and 0 < row.error < packing.step * row.norm * 3
    model.unmerge_adapter()
    assert layer.weight is before and not layer.veneer_merged
    assert all(torch.equal(a, b) for a, b in zip(packing.tensors(layer), bytes_before, strict=True))
    with torch.no_grad():
        assert torch.equal(model(x), y)


def _holding(W: Tensor, b: Tensor) -> nn.Linear:
    layer = nn.Linear(IN, OUT)
    with torch.no_grad():
        layer.weight.copy_(W), layer.bias.copy_(b)
    return layer


def test_merge_and_unload_gives_a_plain_packed_layer(packing, method):
    model, x = make(method, packing).eval(), inputs()
    cls = type(packing.pack(plain()))
    with torch.no_grad():
        model.merge_adapter()
        y = model(x)
        model.unmerge_adapter()
        plainly = model.merge_and_unload()
        assert type(plainly.layer) is cls and torch.equal(plainly(x), y)


def test_copies_are_equal_and_independent(packing, method):
    model, x = make(method, packing), inputs()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        next(p for p in twin.parameters() if p.requires_grad).add_(0.5)
    assert not torch.equal(twin(x), model(x))


def test_losses_over_twenty_steps_are_near_those_of_the_float_base(packing, method):
    """To the packing's own error of the output: the curve of the unpacked weight to 1e-3, that of the float weight to what packing changed."""
    x = inputs(64)
    target = nn.functional.linear(x, plain(8).weight.detach(), plain(8).bias.detach())

    def curve(layer: nn.Module) -> Tensor:
        torch.manual_seed(5)
        model = get_peft_model(Model(layer), method.config(target_modules=["layer"], **method.options)).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    own, unpacked, float_ = curve(packing.pack(plain())), curve(_holding(packing.read(packing.pack(plain())), plain().bias)), curve(plain())
    assert own[-1] < own[0]
    torch.testing.assert_close(own, unpacked, rtol=1e-3, atol=0)
    torch.testing.assert_close(own, float_, rtol=0.05, atol=0)


@pytest.mark.parametrize("rare", RARE, ids=lambda p: p.id)
def test_packing_again_keeps_the_layers_own_settings(rare):
    """Bits, groups, symmetry and the types of the scales."""
    layer = rare.pack(plain())
    storage = storage_of(layer, "weight")
    again = storage.pack(layer, "weight", storage.read(layer, "weight"))
    own = layer.weight.__tensor_flatten__()
    assert again.__tensor_flatten__() == own
    for name in own[0]:
        a, b = getattr(again, name), getattr(layer.weight, name)
        assert a.dtype is b.dtype and a.shape == b.shape, name
    W = layer.weight.dequantize().float()
    assert float((again.dequantize() - W).abs().max()) <= rare.step * float(W.abs().max())
    model = get_peft_model(Model(layer), LoraConfig(target_modules=["layer"], init_lora_weights=False))
    model.merge_adapter()
    assert model.get_base_model().layer.weight.__tensor_flatten__() == own


def test_lengths_of_rows_follow_the_weight(packing, reads):
    """DoRA keeps the lengths of W's rows for one version of the packed numbers only."""
    dora = next(c for c in CASES if c.id == "dora-packed")
    model, x = make(dora, packing), inputs()
    layer = model.get_base_model().layer
    for seed in (1, 2):
        storage = storage_of(layer, "weight")
        storage.put(layer, "weight", storage.pack(layer, "weight", plain(seed).weight.detach()))
        W, b = dense(dora, packing, model)
        del reads[:]
        model(x), model(x)
        assert len(reads) == 1
        close(model(x), x.double() @ W.T + b)


def test_lengths_of_rows_that_inference_found_serve_training(packing):
    dora = next(c for c in CASES if c.id == "dora-packed")
    model, x = make(dora, packing), inputs()
    layer = model.get_base_model().layer
    storage = storage_of(layer, "weight")
    storage.put(layer, "weight", storage.pack(layer, "weight", plain(1).weight.detach()))
    with torch.inference_mode():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# So the compiler itself says when it meets the autograd functions of bitsandbytes.
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["lora-packed", "dora-packed", "oft-packed"])
def test_compiles_whole_and_once(packing, name):
    model, x = make(next(c for c in CASES if c.id == name), packing).train(), inputs()
    model(x)  # in which 8-bit rows go from the parameter to the layer's state
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        y = compiled(x)
        y.sum().backward()
        close(y, model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_from_the_weight_unpack_it_once(packing, reads, init):
    model, x = (
        get_peft_model(Model(packing.pack(plain())), LoraConfig(r=4, target_modules=["layer"], init_lora_weights=init)).train(),
        inputs(),
    )
    assert len(reads) == 1
    y = model(x)
    assert len(reads) == 1
    with model.disable_adapter():
        close(y, model(x), 1e-5)


def test_several_active_adapters_add_their_changes(packing, reads):
    model, x = (
        get_peft_model(Model(packing.pack(plain())), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)).train(),
        inputs(),
    )
    model.add_adapter("other", VeraConfig(r=3, target_modules=["layer"]))
    randomise(model)
    single = []
    for name in ("default", "other"):
        model.set_adapter(name)
        single.append(model(x))
    model.set_adapter(["default", "other"])
    with torch.no_grad():
        both = model(x)
        with model.disable_adapter():
            base = model(x)
    close(both - base, single[0] + single[1] - 2 * base, 1e-4)
    assert not reads


@pytest.mark.parametrize("name", ["lora-packed", "dora-packed", "loha-packed", "ia3-packed"])
def test_parts_of_a_packed_fused_layer(packing, reads, name):
    method = next(c for c in CASES if c.id == name)
    torch.manual_seed(5)
    layouts = {"layer": {"q": 16, "k": 8, "v": 8}}
    model = get_peft_model(
        Model(packing.pack(plain())), method.config(target_modules=["layer.q", "layer.v"], fused_layouts=layouts, **method.options)
    ).train()
    randomise(model)
    x = inputs()
    y, W = model(x), packing.read(model.get_base_model().layer).double()
    assert not reads or name == "dora-packed"
    b = model.get_base_model().layer.bias.detach().double()
    for part, rows in (("q", slice(0, 16)), ("v", slice(24, 32))):
        t = {k.removeprefix(f"{part}."): v for k, v in method.tensors(model).items() if k.startswith(f"{part}.")}
        mine = method.dense(W[rows], t, type(method.kind.weights[0].where)(len(b[rows]), IN))
        bias = b[rows] * t["ia3_l"].flatten() if method.scales_bias else b[rows]
        close(y[..., rows], x.double() @ mine.T + bias)
    with model.disable_adapter():
        close(y[..., 16:24], model(x)[..., 16:24])


# A million is infinite in float16, in which 8-bit rows are packed.
BAD = [(p, bad) for p in PACKINGS for bad in (float("nan"), float("inf"))] + [(p, 1e6) for p in PACKINGS if p.id == "int8"]


@pytest.mark.parametrize(("packing", "bad"), BAD, ids=lambda v: getattr(v, "id", str(v)))
def test_numbers_that_are_not_finite_are_refused_and_nothing_changes(packing, bad):
    model = get_peft_model(Model(packing.pack(plain())), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)).eval()
    layer = model.get_base_model().layer
    before, bytes_before = layer.weight, [t.clone() for t in packing.tensors(layer)]
    with torch.no_grad():
        layer.veneer["default"].weight.lora_B[0, 0] = bad
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(StateError, match="NaN or infinite numbers into layer"):
            merge()
        assert layer.weight is before and not layer.veneer_merged and model.active_adapters == ["default"]
        assert all(torch.equal(a, b) for a, b in zip(packing.tensors(layer), bytes_before, strict=True))
