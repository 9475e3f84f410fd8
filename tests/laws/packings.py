"""Every packing of a linear layer's weight, made and read by the packages themselves."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup, PerTensor
from torchao.quantization.quant_primitives import MappingType

# Its 8-bit layers report in every eval forward that they round activations.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Packing:
    """One way to pack.

    Args:
        pack: a packed layer from a float one, which is left as it is.
        read: the numbers of a packed layer's weight.
        tensors: everything that the packed numbers consist of.
        step: the largest error that packing makes of a number, of the largest absolute number.
        rounds_activations: in eval mode the layer rounds its input too.
    """

    id: str
    pack: Callable[[nn.Linear], nn.Linear]
    read: Callable[[nn.Module], Tensor]
    tensors: Callable[[nn.Module], list[Tensor]]
    step: float
    rounds_activations: bool = False


def four_bit(code: str, *, double: bool, step: float) -> Packing:
    def pack(linear: nn.Linear) -> nn.Linear:
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, compress_statistics=double, quant_type=code
        )
        packed.load_state_dict(linear.state_dict())
        return packed.to("cpu").requires_grad_(False)

    def read(layer: nn.Module) -> Tensor:
        return bnb.functional.dequantize_4bit(layer._parameters["weight"].data, layer._parameters["weight"].quant_state)

    def tensors(layer: nn.Module) -> list[Tensor]:
        state = layer._parameters["weight"].quant_state
        assert state is layer.quant_state
        more = [state.offset, state.state2.absmax, state.state2.code] if double else []
        return [layer._parameters["weight"].data, state.absmax, state.code, *more]

    return Packing(code + ("-double" if double else ""), pack, read, tensors, step)


def eight_bit() -> Packing:
    def pack(linear: nn.Linear) -> nn.Linear:
        packed = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
        packed.load_state_dict(linear.state_dict())
        return packed.to("cpu").requires_grad_(False)

    def lengths(layer: nn.Module) -> Tensor:
        own = layer._parameters["weight"].SCB
        return layer.state.SCB if own is None else own

    def read(layer: nn.Module) -> Tensor:
        return bnb.functional.int8_vectorwise_dequant(layer._parameters["weight"].data, lengths(layer))

    return Packing("int8", pack, read, lambda layer: [layer._parameters["weight"].data, lengths(layer)], 0.005, rounds_activations=True)


def of_torchao(name: str, config: object, step: float) -> Packing:
    def pack(linear: nn.Linear) -> nn.Linear:
        around = nn.Sequential(copy.deepcopy(linear)).requires_grad_(False)
        quantize_(around, config)
        return around[0]

    def read(layer: nn.Module) -> Tensor:
        return layer._parameters["weight"].dequantize()

    def tensors(layer: nn.Module) -> list[Tensor]:
        own = layer._parameters["weight"]
        return [getattr(own, n) for n in own.__tensor_flatten__()[0]]

    return Packing(name, pack, read, tensors, step)


PACKINGS = [
    four_bit("nf4", double=False, step=0.16),
    four_bit("nf4", double=True, step=0.17),
    four_bit("fp4", double=False, step=0.17),
    eight_bit(),
    of_torchao("torchao-int8", Int8WeightOnlyConfig(), 0.005),
    of_torchao("torchao-int4", IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), 0.08),
]

RARE = [
    of_torchao("torchao-int8-tensor", Int8WeightOnlyConfig(granularity=PerTensor()), 0.005),
    of_torchao("torchao-int8-group", Int8WeightOnlyConfig(granularity=PerGroup(16)), 0.005),
    of_torchao(
        "torchao-int3-asymmetric",
        IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(16), mapping_type=MappingType.ASYMMETRIC),
        0.2,
    ),
    of_torchao(
        "torchao-int4-half-scales",
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), scale_dtype=torch.bfloat16),
        0.09,
    ),
]
