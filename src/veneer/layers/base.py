"""What differs from one layer class to the next, and from one packing of the weight to the next.

A kind answers: what (out, in) is, how an operator acts on this layer's input, and where the bias goes. A storage answers: read the weight, write
the weight. Neither knows of any method.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..operators import Operator


class Storage(Protocol):
    """How a layer's weight is packed."""

    name: str

    def read(self, layer: nn.Module) -> Tensor:
        """The weight as a plain tensor in the layer's own shape."""
        ...

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        """Replace the weight's numbers, in place."""
        ...


class LayerKind(Protocol):
    """How an (out × in) map acts in one class of layer. All methods take the layer, so a kind holds no state."""

    name: str

    def matches(self, layer: nn.Module) -> bool:
        """Whether this kind serves the layer."""
        ...

    def storage(self, layer: nn.Module) -> Storage:
        """How the layer's weight is packed."""
        ...

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """(out, in) of the layer as a linear map."""
        ...

    def matrix(self, layer: nn.Module) -> Tensor:
        """The weight as an (out, in) matrix."""
        ...

    def write(self, layer: nn.Module, matrix: Tensor) -> None:
        """Replace the weight by an (out, in) matrix."""
        ...

    def bias(self, layer: nn.Module) -> Tensor | None:
        """The layer's bias (out,), or None."""
        ...

    def rotate_input(self, layer: nn.Module, R: Operator, x: Tensor) -> Tensor:
        """R x, to be given to the layer's own forward."""
        ...

    def add_change(self, layer: nn.Module, y: Tensor, delta: Operator, x: Tensor) -> Tensor:
        """y + Δ x; may overwrite y."""
        ...

    def scale_output(self, layer: nn.Module, y: Tensor, L: Operator) -> Tensor:
        """L (y − b) + b for y = W x + b."""
        ...

    def forward_with(self, layer: nn.Module, matrix: Tensor, x: Any) -> Tensor:
        """The layer's own forward with `matrix` in place of its weight."""
        ...
