"""torchao: whole numbers of 8 bits or fewer, scaled by rows or by groups, as a tensor subclass in a plain layer; weights only.

A parameter can only be of the package's classes if somebody has imported it, so it is looked up among the loaded modules and never imported here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Storage

_INT8, _INTX = "Int8Tensor", "IntxUnpackedToInt8Tensor"


def _class_name(parameter: Any) -> str | None:
    """The name of the package's class that a parameter is of; None for other tensors."""
    package = sys.modules.get("torchao.utils")
    return type(parameter).__name__ if package is not None and isinstance(parameter, package.TorchAOBaseTensor) else None


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is of the package's classes."""
    return _class_name(parameter) is not None


def why_not(parameter: Any) -> str | None:
    """Why a parameter of the package has no storage here, as the end of a sentence; None for others."""
    name = _class_name(parameter)
    if name is None:
        return None
    if name in (_INT8, _INTX):
        return f"holds a {name} of torchao that rounds activations too; what can be adapted is weight-only"
    return f"holds a {name} of torchao, a packing that is not supported; supported are {_INT8} and {_INTX} (int8 and intx, weight-only)"


class Torchao(Storage):
    """One class of tensors of whole numbers.

    Args:
        cls: the class's name.
        bits: of a number.
    """

    def __init__(self, cls: str, bits: int) -> None:
        self.cls, self.bits, self.name = cls, bits, f"torchao int{bits}"

    def matches(self, layer: Any, tensor: str) -> bool:
        own = layer._parameters[tensor]
        if _class_name(own) != self.cls or getattr(own, "act_quant_kwargs", None) or getattr(own, "activation_quantization", None):
            return False
        return self.cls == _INT8 or own.target_dtype is getattr(torch, f"int{self.bits}")

    def read(self, layer: Any, tensor: str) -> Tensor:
        return layer._parameters[tensor].dequantize()

    def times(self, layer: Any, tensor: str, x: Tensor) -> Tensor:
        own = layer._parameters[tensor]
        with torch.no_grad():
            return F.linear(x.to(own.dtype), own)

    def packed(self, layer: Any, tensor: str) -> Tensor:
        return layer._parameters[tensor].qdata

    def pack(self, layer: Any, tensor: str, value: Tensor) -> nn.Parameter:
        own = layer._parameters[tensor]
        primitives = sys.modules["torchao.quantization.quant_primitives"]
        zero = own.zero_point
        symmetric = zero is None or not bool(zero.any())
        mapping = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
        value = value.to(own.dtype).contiguous()
        if self.cls == _INT8:
            new = type(own).from_hp(value, _granularity(own), mapping_type=mapping, reduce_range=own.reduce_range)
        else:
            new = type(own).from_hp(value, own.block_size, own.target_dtype, mapping_type=mapping)
            if new.scale.dtype != own.scale.dtype:
                given = {"custom_scale": new.scale.to(own.scale.dtype), "custom_zero_point": new.zero_point}
                new = type(own).from_hp(value, own.block_size, own.target_dtype, intx_choose_qparams_algorithm=None, **given)
        return nn.Parameter(new, requires_grad=False)

    def device(self, parameter: Any) -> torch.device:
        return parameter.qdata.device

    def move(self, parameter: Any, device: torch.device) -> None:
        for name in parameter.__tensor_flatten__()[0]:
            setattr(parameter, name, getattr(parameter, name).to(device))


def _granularity(own: Any) -> Any:
    """How far one scale of an 8-bit tensor reaches, as its maker wants it said."""
    said = sys.modules["torchao.quantization.granularity"]
    if tuple(own.block_size) == tuple(own.shape):
        return said.PerTensor()
    return said.PerRow() if own.block_size[-1] == own.shape[-1] else said.PerGroup(own.block_size[-1])


STORAGES = (Torchao(_INT8, 8), *(Torchao(_INTX, bits) for bits in range(1, 9)))
