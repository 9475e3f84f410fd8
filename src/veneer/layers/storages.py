"""Storages: how the bits of a weight are packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FloatStorage:
    """A weight that is a floating-point tensor as it stands."""

    name = "float"

    def read(self, layer: nn.Module, tensor: str) -> Tensor:
        value = layer._parameters[tensor]
        assert value is not None
        return value

    @torch.no_grad()
    def write(self, layer: nn.Module, tensor: str, value: Tensor) -> None:
        own = self.read(layer, tensor)
        own.copy_(value.to(own.dtype))


FLOAT = FloatStorage()
