"""Storages: how the bits of a weight are packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FloatStorage:
    """A weight that is a floating-point tensor as it stands."""

    name = "float"

    def read(self, layer: nn.Module) -> Tensor:
        return layer.weight  # type: ignore[return-value]  # kinds with this storage have a tensor there

    @torch.no_grad()
    def write(self, layer: nn.Module, weight: Tensor) -> None:
        layer.weight.copy_(weight.to(layer.weight.dtype))  # type: ignore[operator, arg-type]  # as above


FLOAT = FloatStorage()
