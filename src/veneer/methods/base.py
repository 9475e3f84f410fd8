"""What a method is: named parameters with shapes and inits, and an equation on W. It sees (out, in) and nothing else.

A method holds numbers (rank, scale) and no tensors; the parameters belong to the adapted layer and come back as `p`. So `equation` is a pure
function, a combinator such as DoRA wraps any other method, and the number of trainable parameters is known without building anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..operators import Adapted


@dataclass(frozen=True)
class Facts:
    """What a method says about itself; documentation, listings and tests read it."""

    title: str
    equation: str
    arxiv: str
    equation_number: str
    year: int
    learning_rate: float
    """A good AdamW learning rate for vision transformers, used as the method's preset."""
    mergeable: bool = True


@dataclass(frozen=True)
class Parameter:
    """One trainable tensor of a method.

    Args:
        name: its attribute name in the adapted layer.
        key: its name in the adapter file, behind the layer's path.
        shape: its shape.
        init: fills the tensor in place; gets the fresh equation's W for the inits that depend on it.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    init: Callable[[Tensor], Any]

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


class Method:
    """One adapter of one layer, as mathematics."""

    def parameters(self, out: int, in_: int) -> list[Parameter]:
        """The trainable tensors for an (out × in) layer."""
        raise NotImplementedError

    def equation(self, W: Adapted, p: Any) -> Adapted:
        """W' from W and the parameters `p`, whose attributes are named as in `parameters`."""
        raise NotImplementedError

    def finish(self, W: Adapted, p: Any) -> None:
        """Set what depends on W, once all parameters have their first values."""

    @property
    def dropout(self) -> float:
        """The probability with which a number of the change's input is zeroed while training."""
        return 0.0

    def count(self, out: int, in_: int) -> int:
        """The number of trainable parameters for an (out × in) layer."""
        return sum(p.numel for p in self.parameters(out, in_))
