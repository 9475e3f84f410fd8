"""The kind of `nn.Linear` and its subclasses with a floating-point weight (out, in)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators import Operator
from .storages import FLOAT, FloatStorage


class LinearKind:
    """y = W x + b on the last dimension of x."""

    name = "linear"

    def matches(self, layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Linear) or isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return False
        return layer.weight.is_floating_point() and layer.weight.shape == (layer.out_features, layer.in_features)

    def storage(self, layer: nn.Module) -> FloatStorage:
        return FLOAT

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        return layer.out_features, layer.in_features  # type: ignore[return-value]  # nn.Linear's own numbers

    def matrix(self, layer: nn.Module) -> Tensor:
        return self.storage(layer).read(layer)

    def write(self, layer: nn.Module, matrix: Tensor) -> None:
        self.storage(layer).write(layer, matrix)

    def bias(self, layer: nn.Module) -> Tensor | None:
        return layer.bias  # type: ignore[return-value]  # nn.Linear's own

    def rotate_input(self, layer: nn.Module, R: Operator, x: Tensor) -> Tensor:
        return R.apply(x)

    def add_change(self, layer: nn.Module, y: Tensor, delta: Operator, x: Tensor) -> Tensor:
        return delta.add_to(y, x)

    def scale_output(self, layer: nn.Module, y: Tensor, L: Operator) -> Tensor:
        b = self.bias(layer)
        z = L.apply(y)
        return z if b is None else z + (b - L.apply(b))

    def forward_with(self, layer: nn.Module, matrix: Tensor, x: Tensor) -> Tensor:
        b = self.bias(layer)
        dtype = torch.promote_types(x.dtype, matrix.dtype)
        return F.linear(x.to(dtype), matrix.to(dtype), None if b is None else b.to(dtype))
