"""The kind of convolutions in one, two and three dimensions: a linear map of patches, its columns the channels of one group times the kernel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..form import Form
from ..operators import Diagonal, LowRank, Operator, Sum
from .base import LayerKind, common, settled
from .storages import storage_of

_FUNCTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvKind(LayerKind):
    """y = W ∗ x + b with stride, padding of every mode, dilation and groups.

    Each group of outputs sees its own channels through the same columns. So in every equation the groups share what acts on columns, such as LoRA's A.
    """

    name = "convolution"
    # A patch overlaps its neighbours, so R x is no image; W R is one small product more.
    rotates_input = False

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and storage_of(layer, self.tensor) is not None

    def form(self, layer: Any) -> Form:
        kernel = tuple(layer.kernel_size)
        return Form(layer.out_channels, layer.weight.numel() // layer.out_channels, kernel)

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def to_weight(self, layer: Any, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], -1, *layer.kernel_size)

    def leading(self, layer: Any, x: Tensor) -> int:
        return x.dim() - 1 - len(layer.kernel_size)

    def spread(self, layer: Any, v: Tensor) -> Tensor:
        return v.reshape(-1, *(1 for _ in layer.kernel_size))

    def apply(self, layer: Any, S: Operator, x: Tensor) -> Tensor:
        if isinstance(S, Sum):
            y = self.apply(layer, S.terms[0], x)
            for term in S.terms[1:]:
                y = y + self.apply(layer, term, x)
            return y
        if isinstance(S, LowRank):
            # A on every group, then B from each group's own r numbers.
            groups = layer.groups
            A = self.to_weight(layer, S.A)
            h = self._convolve(layer, A.repeat(groups, *(1 for _ in A.shape[1:])) if groups > 1 else A, None, x)
            return _FUNCTIONS[len(layer.kernel_size)](h, S.B.reshape(*S.B.shape, *(1 for _ in layer.kernel_size)), groups=groups)
        return self._convolve(layer, self.to_weight(layer, S.dense()), None, x)

    def on_output(self, layer: Any, L: Operator, y: Tensor) -> Tensor:
        if isinstance(L, Diagonal):
            return y * self.spread(layer, L.d)
        channels = -1 - len(layer.kernel_size)
        return L.apply(y.movedim(channels, -1)).movedim(-1, channels)

    def forward_with(self, layer: Any, matrix: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        wide, matrix, bias = common(x, matrix, bias)
        return settled(self._convolve(layer, self.to_weight(layer, matrix), bias, wide), x)

    def _convolve(self, layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        return _FUNCTIONS[len(layer.kernel_size)](x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
