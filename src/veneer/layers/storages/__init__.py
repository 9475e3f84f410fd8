"""Storages: how the bits of a weight are packed; the table of those there are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..swap import own_modules
from . import bitsandbytes, torchao
from .base import Storage
from .floating import FLOAT, FloatStorage

__all__ = [
    "FLOAT",
    "KEEP_SMALL_TYPES",
    "FloatStorage",
    "Storage",
    "hold_packing",
    "is_packed",
    "number_of",
    "release_packing",
    "storage_of",
    "unknown_packing",
    "why_packed",
]

PACKED: tuple[Storage, ...] = (*bitsandbytes.STORAGES, *torchao.STORAGES)

KEEP_SMALL_TYPES = {"gptq", "aqlm", "eetq", "torchao", "hqq"}
"""transformers' names of the packings whose other, small parameters must keep the type they were made for."""

SUPPORTED = "bitsandbytes nf4, fp4 and int8, torchao int8 and intx (weight-only)"

# What layers of other packages keep in place of a weight.
_BUFFERS = ("qweight", "W_q", "codes", "weight_packed", "trellis")


def storage_of(layer: nn.Module, tensor: str) -> Storage | None:
    """How one parameter of a layer is packed; None where that is not known, or there is no such parameter."""
    own = layer._parameters.get(tensor)
    if own is None:
        return None
    if type(own) is nn.Parameter and FLOAT.matches(layer, tensor):
        return FLOAT
    packed = next((s for s in PACKED if s.matches(layer, tensor)), None)
    if packed is not None or why_packed(layer, tensor) is not None:
        return packed
    return FLOAT if FLOAT.matches(layer, tensor) else None


def why_packed(layer: nn.Module, tensor: str = "weight") -> str | None:
    """What packing of a layer's weight is not supported, as the end of a sentence; None where it is not packed."""
    own = layer._parameters.get(tensor)
    why = (bitsandbytes.why_not(layer) if tensor == "weight" else None) or torchao.why_not(own)
    if why is not None:
        return why
    held = {**layer._parameters, **layer._buffers}
    if own is None and any(held.get(name) is not None for name in _BUFFERS):
        name = f"{type(layer).__name__} ({type(layer).__module__})"
        return f"is a {name}, whose weight is packed in a way that is not supported; supported are {SUPPORTED}"
    return None


def unknown_packing(model: nn.Module) -> str | None:
    """A weight of a model that is packed in a way that is not supported, as a sentence's beginning; None where there is none."""
    for path, layer in own_modules(model):
        for tensor in dict.fromkeys(["weight", *layer._parameters]):
            why = why_packed(layer, tensor) if storage_of(layer, tensor) is None else None
            if why is not None:
                return f"{path} {why}"
    return None


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is packed, so that it can be neither trained nor cast."""
    return bitsandbytes.is_packed(parameter) or torchao.is_packed(parameter)


def number_of(parameter: Tensor) -> int:
    """How many numbers a parameter stands for."""
    found = bitsandbytes.count(parameter)
    return parameter.numel() if found is None else found


def hold_packing(model: nn.Module) -> dict[str, Any]:
    """Keep every layer from packing its weight in a way that no gradient comes back through; returns what `release_packing` needs, by path.

    Of the whole model, because gradients run through the layers without an adapter too.
    """
    found = {path: bitsandbytes.keep_packing(module) for path, module in own_modules(model)}
    return {path: before for path, before in found.items() if before is not None}


def release_packing(model: nn.Module, before: dict[str, Any]) -> None:
    """Undo `hold_packing`."""
    for path, value in before.items():
        bitsandbytes.allow(model.get_submodule(path), value)
