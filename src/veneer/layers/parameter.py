"""The kind of bare parameters: weights that a module reads itself, without calling a layer, as matrices or as stacks of them."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..form import Form
from .base import LayerKind
from .storages import storage_of


class ParameterKind(LayerKind):
    """A parameter (out, in), or (experts, out, in) of independent maps; transposed where the module says `is_transposed`.

    Args:
        tensor: the parameter's name.
        offset: the name of the bias that goes with it, if there is one.
    """

    name: ClassVar[str] = "parameter"
    called = False

    def __init__(self, tensor: str, offset: str | None = None) -> None:
        self.tensor, self.offset = tensor, offset

    def __reduce__(self) -> tuple[type[ParameterKind], tuple[str, str | None]]:
        return ParameterKind, (self.tensor, self.offset)

    def matches(self, layer: nn.Module) -> bool:
        weight = layer._parameters.get(self.tensor)
        return weight is not None and weight.dim() in (2, 3) and storage_of(layer, self.tensor) is not None

    def _flipped(self, layer: nn.Module, weight: Tensor) -> bool:
        return weight.dim() == 3 and bool(getattr(layer, "is_transposed", False))

    def form(self, layer: nn.Module) -> Form:
        weight = layer._parameters[self.tensor]
        assert weight is not None
        *experts, out, in_ = weight.shape
        if self._flipped(layer, weight):
            out, in_ = in_, out
        return Form(out, in_, experts=experts[0] if experts else None)

    def to_matrix(self, layer: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT if self._flipped(layer, weight) else weight

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.mT if self._flipped(layer, matrix) else matrix
