"""Packed layers in a model: the trap of eval forwards, what is refused and why, counts, tables, where originals are kept."""

from __future__ import annotations

import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

from veneer import (
    ConfigError,
    LoraConfig,
    MergeReport,
    TargetError,
    get_model_status,
    get_peft_model,
    plan,
    prepare_model_for_kbit_training,
)
from veneer.layers.storages import storage_of

WIDTH = 64


def four_bit(in_: int = WIDTH, out: int = WIDTH, code: str = "nf4", double: bool = True, **options) -> nn.Module:
    layer = bnb.nn.Linear4bit(in_, out, compute_dtype=torch.float32, quant_type=code, compress_statistics=double, **options)
    return layer.to("cpu").requires_grad_(False)


def eight_bit(in_: int = WIDTH, out: int = WIDTH) -> nn.Module:
    return bnb.nn.Linear8bitLt(in_, out, has_fp16_weights=False).to("cpu").requires_grad_(False)


def of_torchao(config, in_: int = WIDTH, out: int = WIDTH) -> nn.Module:
    around = nn.Sequential(nn.Linear(in_, out)).requires_grad_(False)
    quantize_(around, config)
    return around[0]


INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
LAYERS = {
    "nf4": four_bit,
    "fp4": lambda: four_bit(code="fp4", double=False),
    "int8": eight_bit,
    "torchao-int8": lambda: of_torchao(Int8WeightOnlyConfig()),
    "torchao-int4": lambda: of_torchao(INT4),
}


@pytest.fixture(params=LAYERS.values(), ids=list(LAYERS))
def layer(request) -> nn.Module:
    return request.param()


def repacking(layer: nn.Module) -> nn.Module:
    """A layer as on a processor with bfloat16 units, where an eval forward packs the weight anew."""
    layer.support_avx512bf16_for_cpu = True
    return layer


def test_an_eval_forward_leaves_4_bit_weights_as_they_are_so_that_gradients_come_back():
    bare = repacking(four_bit()).eval()
    bare(torch.randn(2, WIDTH))
    assert bare.weight.quant_state.packing_format_for_cpu  # what is guarded against

    base = nn.Sequential(repacking(four_bit()), repacking(four_bit()))
    before = [m.weight.data.clone() for m in base]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        y = model.eval()(x)
    assert all(torch.equal(m.weight.data, b) for m, b in zip(base, before, strict=True))
    model.train()(x).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and bool(g.abs().sum() > 0) for g in grads)  # through the second layer, which has no adapter
    torch.testing.assert_close(model.eval()(x), y)
    assert not any(m.support_avx512bf16_for_cpu for m in base)
    model.unload()
    assert all(m.support_avx512bf16_for_cpu is True for m in base)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_a_weight_that_was_packed_anew_before_is_brought_back(code, double):
    base = nn.Sequential(repacking(four_bit(code=code, double=double)))
    numbers, W = base[0].weight.data.clone(), storage_of(base[0], "weight").read(base[0], "weight")
    base.eval()(torch.randn(2, WIDTH))
    assert not torch.equal(base[0].weight.data.flatten(), numbers.flatten())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    assert torch.equal(base[0].weight.data, numbers)
    torch.testing.assert_close(
        storage_of(base[0], "weight").read(base[0], "weight"), W, rtol=2**-7, atol=0
    )  # its scales were rounded to bfloat16
    x = torch.randn(3, WIDTH, requires_grad=True)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, x @ storage_of(base[0], "weight").read(base[0], "weight").T + base[0].bias)
    assert x.grad is not None


class QuantLinear(nn.Module):
    """As the layers of GPTQ and AWQ keep their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 8))


class HQQLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            QuantLinear,
            r"0, which is a QuantLinear \(.*\), whose weight is packed in a way that is not supported; supported are bitsandbytes nf4",
        ),
        (HQQLinear, "0, which is a HQQLinear"),
        (lambda: bnb.nn.Linear4bit(8, 8), "Linear4bit of bitsandbytes that is not quantised yet; move the model to its device"),
        (lambda: bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False), "Linear8bitLt of bitsandbytes that is not quantised yet"),
        (lambda: bnb.nn.Linear8bitLt(8, 8), "has_fp16_weights=True, which packs its weight anew in every forward"),
        (lambda: bnb.nn.Embedding8bit(8, 8).to("cpu"), "Embedding8bit of bitsandbytes, an embedding whose table is packed"),
        (lambda: of_torchao(Int8DynamicActivationInt8WeightConfig()), "Int8Tensor of torchao that rounds activations too"),
        (lambda: nn.Linear(8, 8).requires_grad_(False).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_packings_that_are_not_supported_are_named(make, message):
    base = nn.Sequential(make(), nn.Linear(4, 4))
    before = [type(m) for m in base.modules()]
    with pytest.raises(TargetError, match=message):
        get_peft_model(base, LoraConfig(target_modules=["0"]))
    assert [type(m) for m in base.modules()] == before


def test_a_packed_module_cannot_be_trained_whole(layer):
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer)
    with pytest.raises(TargetError, match=r'1 is packed.*modules_to_save trains it whole.*llm_int8_skip_modules=\["1"\]'):
        get_peft_model(base, LoraConfig(target_modules=["0"], modules_to_save=["1"]))


def test_counts_are_of_numbers_and_not_of_bytes(layer):
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))
    whole = WIDTH * WIDTH + WIDTH + 2 * 2 * WIDTH
    assert model.get_nb_trainable_parameters() == (4 * WIDTH, whole)
    assert get_model_status(model).total_params == whole


def test_the_plan_says_how_each_weight_is_packed(layer):
    made = plan(nn.Sequential(layer, nn.Linear(WIDTH, 3)), LoraConfig(r=2, target_modules=["0", "1"]))
    packed = storage_of(layer, "weight").name
    assert [s.storage for s in made.sites] == [packed, "float"] and packed in str(made)
    assert f"frozen: {WIDTH * WIDTH + WIDTH + 3 * WIDTH + 3:,} parameters" in str(made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_and_the_output_is_of_the_inputs_type(layer, dtype):
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    assert {p.dtype for n, p in model.named_parameters() if ".veneer." in n} == {torch.float32}
    if (isinstance(layer.weight.data, torch.Tensor) and type(layer) is nn.Linear) or "torchao" in storage_of(layer, "weight").name:
        model.to(dtype)
    y = model(torch.randn(3, WIDTH, dtype=dtype))
    assert y.dtype is dtype
    y.float().sum().backward()


def test_preparing_for_training_leaves_packed_numbers_alone(layer):
    model = nn.Sequential(layer, nn.LayerNorm(WIDTH).to(torch.bfloat16))
    before = layer.weight, layer.weight.dtype
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert (layer.weight, layer.weight.dtype) == before and model[1].weight.dtype is torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="originals can go from one device to another only where there are two")
def test_originals_of_a_gpu_can_be_kept_in_main_memory(layer):
    model = get_peft_model(nn.Sequential(layer).cuda(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    x, own, storage = torch.randn(2, WIDTH).cuda(), layer.weight, storage_of(layer, "weight")
    with torch.no_grad():
        y = model(x)
        model.merge_adapter(originals_device="cpu")
        assert layer.veneer_merged["weight"] is own and storage.device(own).type == "cpu"
        model.unmerge_adapter()
        assert layer.weight is own and storage.device(own).type == "cuda" and torch.equal(model(x), y)


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig(), INT4], ids=["int8", "int4"])
def test_everything_that_a_tensor_of_torchao_consists_of_moves(config):
    """To the one other device that every machine has, from which nothing comes back."""
    layer = of_torchao(config)
    storage, own = storage_of(layer, "weight"), layer.weight
    storage.move(own, torch.device("meta"))
    held = [getattr(own, n) for n in own.__tensor_flatten__()[0]]
    assert len(held) >= 2 and storage.device(own).type == "meta" and all(t.device.type == "meta" for t in held)


def test_originals_go_where_they_are_asked_to_and_nowhere_else(layer):
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
    x, own = torch.randn(2, WIDTH), layer.weight
    with torch.no_grad():
        y = model(x)
        for device, message in (("meta", "holds no numbers"), ("nowhere", "cannot hold"), ("cuda:99", "cannot hold")):
            with pytest.raises(ConfigError, match=message):
                model.merge_adapter(originals_device=device)
            assert layer.weight is own
        model.merge_adapter(originals_device="cpu")
        assert layer.veneer_merged["weight"] is own and layer.weight is not own
        model.unmerge_adapter()
        assert layer.weight is own and not layer.veneer_merged
        assert torch.equal(model(x), y)


class Peak(TorchDispatchMode):
    """The largest number of bytes that were alive at once of tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and type(t) is torch.Tensor:
                self.note(t.untyped_storage())
        return out

    def note(self, storage) -> None:
        at = storage._cdata
        if at in self.seen:
            return
        self.seen.add(at)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self.seen.discard(at)
            self.now -= size

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("make", [lambda: nn.Linear(WIDTH, WIDTH).to(torch.bfloat16), *LAYERS.values()], ids=["bfloat16", *LAYERS])
def test_merging_for_good_holds_one_weight_at_a_time(make):
    """The peak does not grow with the number of layers; what was packed anew is counted as it replaces what was there."""

    def peak(layers: int) -> int:
        model = get_peft_model(
            nn.Sequential(*(make() for _ in range(layers))), LoraConfig(r=2, target_modules=r"\d", init_lora_weights=False)
        )
        gc.collect()
        with Peak() as watched:
            model.merge_and_unload(safe=True, report=MergeReport())
        return watched.most

    packed = WIDTH * WIDTH * 2  # at most; what stays is what replaces the originals
    few, many = peak(2), peak(8)
    assert many - few <= 6 * packed
    assert many <= 8 * packed + 6 * WIDTH * WIDTH * 4
