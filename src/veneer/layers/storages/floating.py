"""The storage of plain floating-point tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Storage


class FloatStorage(Storage):
    """A weight that is a floating-point tensor as it stands."""

    name = "float"
    plain = True

    def matches(self, layer: Any, tensor: str) -> bool:
        own = layer._parameters[tensor]
        # Numbers of 8 bits go with a scale that lies elsewhere in the layer.
        return own.is_floating_point() and own.itemsize >= 2

    def read(self, layer: Any, tensor: str) -> Tensor:
        return layer._parameters[tensor]

    def pack(self, layer: Any, tensor: str, value: Tensor) -> nn.Parameter:
        own = layer._parameters[tensor]
        new = torch.empty_like(own, requires_grad=False)
        new.copy_(value)
        return nn.Parameter(new, requires_grad=False)

    @torch.no_grad()
    def write(self, layer: Any, tensor: str, value: Tensor) -> None:
        own = layer._parameters[tensor]
        own.copy_(value.to(own.dtype))


FLOAT = FloatStorage()
