"""bitsandbytes: blocks of 4-bit numbers (nf4, fp4), and rows of 8-bit numbers.

A layer can only be of the package's classes if somebody has imported it, so it is looked up among the loaded modules and never imported here.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ...operators import pieces
from .base import Storage

_REPACKS = "support_avx512bf16_for_cpu"


def _is(layer: nn.Module, name: str) -> bool:
    package = sys.modules.get("bitsandbytes.nn")
    return package is not None and isinstance(layer, getattr(package, name))


def _functions() -> Any:
    return sys.modules["bitsandbytes.functional"]


def why_not(layer: Any) -> str | None:
    """Why a layer of the package has no storage here, as the end of a sentence; None for layers of other packages."""
    if not (_is(layer, "Linear4bit") or _is(layer, "Linear8bitLt") or _is(layer, "Embedding4bit") or _is(layer, "Embedding8bit")):
        return None
    name = f"is a {type(layer).__name__} of bitsandbytes"
    if isinstance(layer, nn.Embedding):
        return f"{name}, an embedding whose table is packed; of bitsandbytes linear layers can be adapted"
    if _is(layer, "Linear8bitLt") and layer.state.has_fp16_weights:
        return f"{name} with has_fp16_weights=True, which packs its weight anew in every forward; make it with has_fp16_weights=False"
    return f"{name} that is not quantised yet; move the model to its device (`model.to(…)`) first"


class FourBit(Storage):
    """nf4 or fp4: 16 values, scaled block by block, the scales themselves packed where the layer says so.

    Args:
        code: `nf4` or `fp4`.
    """

    def __init__(self, code: str) -> None:
        self.code, self.name = code, f"bitsandbytes {code}"

    def matches(self, layer: Any, tensor: str) -> bool:
        state = self._state(layer) if tensor == "weight" and _is(layer, "Linear4bit") else None
        return state is not None and state.quant_type == self.code

    @staticmethod
    def _state(layer: Any) -> Any:
        own = getattr(layer._parameters["weight"], "quant_state", None)
        return getattr(layer, "quant_state", None) if own is None else own  # FSDP leaves a plain parameter behind

    def shape(self, layer: Any, tensor: str) -> torch.Size:
        return torch.Size(self._state(layer).shape)

    def dtype(self, layer: Any, tensor: str) -> torch.dtype:
        return self._state(layer).dtype

    def read(self, layer: Any, tensor: str) -> Tensor:
        state = copy.copy(self._state(layer))
        state.dtype = torch.float32
        return _functions().dequantize_4bit(layer._parameters[tensor].data, state)

    def times(self, layer: Any, tensor: str, x: Tensor) -> Tensor:
        with torch.no_grad():
            return sys.modules["bitsandbytes"].matmul_4bit(x, layer._parameters[tensor], quant_state=self._state(layer))

    def pack(self, layer: Any, tensor: str, value: Tensor) -> nn.Parameter:
        own, state = layer._parameters[tensor], self._state(layer)
        settings = {
            "quant_type": state.quant_type,
            "quant_storage": own.dtype,
            "blocksize": state.blocksize,
            "compress_statistics": state.nested,
        }
        data, new = _functions().quantize_4bit(value.to(state.dtype).contiguous(), **settings)
        made = sys.modules["bitsandbytes.nn"].Params4bit(data, requires_grad=False, quant_state=new, bnb_quantized=True, **settings)
        made.module = getattr(own, "module", None)
        return made

    def put(self, layer: Any, tensor: str, parameter: nn.Parameter) -> None:
        super().put(layer, tensor, parameter)
        layer.quant_state = getattr(parameter, "quant_state", layer.quant_state)

    def move(self, parameter: Any, device: torch.device) -> None:
        super().move(parameter, device)
        parameter.quant_state.to(device)


class EightBit(Storage):
    """Rows of 8-bit numbers, each row with its largest absolute value."""

    name = "bitsandbytes int8"

    def matches(self, layer: Any, tensor: str) -> bool:
        if tensor != "weight" or not _is(layer, "Linear8bitLt") or layer.state.has_fp16_weights:
            return False
        return layer._parameters[tensor].dtype is torch.int8 and self._lengths(layer) is not None

    @staticmethod
    def _lengths(layer: Any) -> Tensor | None:
        # The first forward moves both from the parameter to the layer's state.
        own = getattr(layer._parameters["weight"], "SCB", None)
        return layer.state.SCB if own is None else own

    def dtype(self, layer: Any, tensor: str) -> torch.dtype:
        return torch.float16  # what the package rounds to before it packs

    def read(self, layer: Any, tensor: str) -> Tensor:
        lengths = self._lengths(layer)
        assert lengths is not None
        return layer._parameters[tensor].data.float().mul_(lengths.float().unsqueeze(1) / 127)

    def times(self, layer: Any, tensor: str, x: Tensor) -> Tensor:
        lengths, numbers = self._lengths(layer), layer._parameters[tensor].data
        assert lengths is not None
        x = x.float()
        columns = [x @ numbers[rows].float().mT for rows in pieces(numbers)]
        return torch.cat(columns, -1).mul_(lengths.float() / 127)

    def pack(self, layer: Any, tensor: str, value: Tensor) -> nn.Parameter:
        numbers, lengths, _ = _functions().int8_vectorwise_quant(value.to(torch.float16).contiguous())
        made = sys.modules["bitsandbytes.nn"].Int8Params(numbers, requires_grad=False, has_fp16_weights=False, CB=numbers, SCB=lengths)
        return made

    def take(self, layer: Any, tensor: str) -> nn.Parameter:
        own = layer._parameters[tensor]
        if getattr(own, "CB", None) is None:
            own.CB, own.SCB = layer.state.CB, layer.state.SCB
        return own

    def put(self, layer: Any, tensor: str, parameter: nn.Parameter) -> None:
        super().put(layer, tensor, parameter)
        layer.state.CB = layer.state.SCB = None

    def move(self, parameter: Any, device: torch.device) -> None:
        super().move(parameter, device)
        parameter.CB, parameter.SCB = parameter.data, parameter.SCB.to(device)


STORAGES = (FourBit("nf4"), FourBit("fp4"), EightBit())


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is one of the package's, packed."""
    package = sys.modules.get("bitsandbytes.nn")
    if package is None or not isinstance(parameter, (package.Params4bit, package.Int8Params)):
        return False
    return not parameter.is_floating_point() or bool(getattr(parameter, "bnb_quantized", False))


def count(parameter: Tensor) -> int | None:
    """How many numbers a packed parameter stands for, where that is not how many it holds."""
    package = sys.modules.get("bitsandbytes.nn")
    if package is None or not isinstance(parameter, package.Params4bit) or not is_packed(parameter):
        return None
    return 2 * parameter.numel() * parameter.element_size()


def keep_packing(layer: Any) -> Any:
    """Keep a 4-bit layer from packing its weight anew in an eval forward on a processor, which no gradient comes back through; returns what `allow` needs.

    A weight that was packed so already is brought back, with the rounded scales that the new packing left of them.
    """
    if not _is(layer, "Linear4bit") or not getattr(layer, _REPACKS, False):
        return None
    before = getattr(layer, _REPACKS)
    setattr(layer, _REPACKS, False)
    weight, state = layer._parameters["weight"], FourBit._state(layer)
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.reshape(-1).float().contiguous()
        state.original_nested = False
        weight.data, state = _functions()._convert_weight_packed_for_cpu_inverse(weight.data, state)
        state.absmax, state.nested = scales, False
        weight.quant_state = layer.quant_state = state
    return before


def allow(layer: Any, before: Any) -> None:
    """Undo `keep_packing`."""
    setattr(layer, _REPACKS, before)
