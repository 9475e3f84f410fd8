"""What differs from one layer class to the next, and from one packing of the weight to the next.

A kind answers: what form the weight has, how a map acts on this layer's input, and along which dimension its features lie. A storage answers: read
the weight, write the weight. Neither knows of any method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import autocasting
from ..form import Form
from ..operators import Diagonal, Operator, Rows
from .storages import Storage, storage_of
from .storages.kept import kept


class LayerKind:
    """How an (out × in) map acts in one class of layer; a kind holds no state of a layer.

    The defaults are those of a layer that is called with features in the last dimension.
    """

    name: ClassVar[str]
    tensor: str = "weight"
    """The parameter that is adapted."""
    offset: str | None = "bias"
    """The parameter that is added to the output."""
    called: ClassVar[bool] = True
    """Whether the layer is called; otherwise its parent reads the parameter."""
    rotates_input: ClassVar[bool] = True
    """Whether R x is again an input that the layer's own forward takes."""

    features_last: ClassVar[bool] = False
    """Whether the layer is the map of each row of its input, whatever the other rows."""

    @property
    def slot(self) -> str:
        """The name of its adapter in the module."""
        return self.tensor

    @property
    def whole(self) -> LayerKind:
        """The kind of the whole weight, where this is of a part."""
        return self

    def part(self, rows: Rows) -> LayerKind:
        """The kind of some of the weight's rows."""
        from .parts import PartKind

        return PartKind(self, rows)

    def matches(self, layer: nn.Module) -> bool:
        """Whether this kind serves the layer."""
        raise NotImplementedError

    def storage(self, layer: nn.Module) -> Storage:
        """How the layer's weight is packed."""
        found = storage_of(layer, self.tensor)
        assert found is not None, f"{type(layer).__name__}.{self.tensor} has no known storage"
        return found

    def form(self, layer: nn.Module) -> Form:
        """Rows and columns of the layer as a linear map."""
        raise NotImplementedError

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight in the layer's own shape as an (out, in) matrix."""
        return weight

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        """An (out, in) matrix in the layer's own shape."""
        return matrix

    def matrix(self, layer: nn.Module) -> Tensor:
        """The weight as an (out, in) matrix."""
        return self.to_matrix(layer, self.storage(layer).read(layer, self.tensor))

    def times(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x Wᵀ for the (out, in) weight alone, outside autograd."""
        W = self.matrix(layer)
        return x.to(W.dtype) @ W.mT

    def packed(self, layer: nn.Module) -> Packed | None:
        """The weight as an operator that unpacks it only where it must; None where it is a plain tensor."""
        return None if self.storage(layer).plain else Packed(layer, self)

    def bias(self, layer: nn.Module) -> Tensor | None:
        """The layer's bias (out,), or None."""
        return None if self.offset is None else layer._parameters.get(self.offset)

    def spread(self, layer: nn.Module, v: Tensor) -> Tensor:
        """A vector over features (out,), so that it meets the layer's output elementwise."""
        return v

    def apply(self, layer: nn.Module, S: Operator, x: Tensor) -> Tensor:
        """S x, without a bias, for the layer's input x."""
        return S.apply(x)

    def add(self, layer: nn.Module, y: Tensor, S: Operator, x: Tensor) -> Tensor:
        """y + S x; may overwrite y."""
        return y + self.apply(layer, S, x)

    def on_output(self, layer: nn.Module, L: Operator, y: Tensor) -> Tensor:
        """L y for the layer's output y."""
        return y * self.spread(layer, L.d) if isinstance(L, Diagonal) else L.apply(y)

    def plain(self, layer: nn.Module) -> Tensor | None:
        """The weight, where the layer does nothing but multiply by it and add its bias."""
        return None

    def leading(self, layer: Any, x: Tensor) -> int:
        """How many dimensions of the layer's input are not features."""
        return x.dim() - 1

    def forward(self, layer: Any, x: Any) -> Any:
        """The layer's own forward, of the frozen weight."""
        return layer.base_forward(x)

    def forward_with(self, layer: nn.Module, matrix: Tensor, bias: Tensor | None, x: Any) -> Tensor:
        """The layer's own forward with `matrix` in place of its weight, and `bias` of its bias; the result has the layer's usual type."""
        raise NotImplementedError


@dataclass(eq=False)
class Packed(Operator):
    """A frozen weight that is packed."""

    layer: nn.Module
    kind: LayerKind

    @property
    def shape(self) -> tuple[int, int]:
        form = self.kind.form(self.layer)
        return form.out, form.in_

    def apply(self, x: Tensor) -> Tensor:
        return self.kind.times(self.layer, x)

    def dense(self) -> Tensor:
        W = self.kind.matrix(self.layer)
        return W.to(torch.promote_types(W.dtype, torch.float32))

    def squared_row_norms(self) -> Tensor:
        return kept(
            self.layer, self.kind.slot, self.kind.storage(self.layer).packed(self.layer, self.kind.tensor), super().squared_row_norms
        )


def common(x: Tensor, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in their widest type."""
    dtype = torch.promote_types(x.dtype, matrix.dtype)
    return x.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype)


def settled(y: Tensor, x: Tensor) -> Tensor:
    """y in the type that the layer itself would give for x: x's, or the one that autocast has chosen."""
    return y if autocasting.is_on(x.device) else y.to(x.dtype)
