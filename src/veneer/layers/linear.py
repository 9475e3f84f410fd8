"""The kinds of linear layers: `nn.Linear` and its subclasses with weight (out, in), and transformers' `Conv1D` with weight (in, out)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..form import Form
from ..operators import Operator
from .base import LayerKind, common, settled
from .storages import storage_of
from .swap import own_class


class LinearKind(LayerKind):
    """y = W x + b on the last dimension of x."""

    name = "linear"
    features_last = True

    def matches(self, layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Linear) or isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return False
        storage = storage_of(layer, self.tensor)
        return storage is not None and storage.shape(layer, self.tensor) == (layer.out_features, layer.in_features)

    def form(self, layer: nn.Module) -> Form:
        return Form(layer.out_features, layer.in_features)  # type: ignore[arg-type]  # nn.Linear's own numbers

    def plain(self, layer: nn.Module) -> Tensor | None:
        own = layer._parameters[self.tensor]
        return own if own_class(layer).forward is nn.Linear.forward and type(own) is nn.Parameter else None

    def times(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.storage(layer).times(layer, self.tensor, x)

    def add(self, layer: nn.Module, y: Tensor, S: Operator, x: Tensor) -> Tensor:
        # What a packed layer's own autograd function gives out may be a view, which nothing may be written into.
        return S.add_to(y, x) if self.storage(layer).plain else y + S.apply(x)

    def forward_with(self, layer: nn.Module, matrix: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return settled(F.linear(*common(x, matrix, bias)), x)


class TransposedLinearKind(LinearKind):
    """transformers' `Conv1D`, a linear layer whose weight lies transposed."""

    name = "transposed linear"

    def matches(self, layer: nn.Module) -> bool:
        # By name, so that transformers is not imported for models that are not its own.
        named = any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(layer).__mro__)
        weight = layer._parameters.get("weight")
        return named and weight is not None and weight.dim() == 2 and storage_of(layer, self.tensor) is not None

    def plain(self, layer: nn.Module) -> Tensor | None:
        return None

    def times(self, layer: nn.Module, x: Tensor) -> Tensor:
        return LayerKind.times(self, layer, x)

    def form(self, layer: nn.Module) -> Form:
        in_, out = layer.weight.shape  # type: ignore[misc]  # a 2-D parameter
        return Form(out, in_)

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT
