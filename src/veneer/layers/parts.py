"""The kind of a part of a fused weight: some rows of it, as a layer of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..form import Form
from ..operators import Operator, Rows
from .base import LayerKind
from .storages import Storage


class PartKind(LayerKind):
    """Some rows of a weight, and of the bias that goes with it.

    Args:
        whole: the kind of the fused weight.
        rows: which rows.
        part: its name, such as `q`.
    """

    def __init__(self, whole: LayerKind, rows: Rows, part: str = "") -> None:
        self._whole, self.rows, self.part_name = whole, rows, part
        self.tensor, self.offset = whole.tensor, whole.offset

    @property
    def name(self) -> str:  # type: ignore[override]  # the whole's
        return f"part of {self._whole.name}"

    @property
    def called(self) -> bool:  # type: ignore[override]  # the whole's
        return self._whole.called

    @property
    def rotates_input(self) -> bool:  # type: ignore[override]  # the whole's
        return self._whole.rotates_input

    @property
    def slot(self) -> str:
        return f"{self.tensor}__{self.part_name}"

    @property
    def whole(self) -> LayerKind:
        return self._whole

    def matches(self, layer: nn.Module) -> bool:
        return self._whole.matches(layer)

    def storage(self, layer: nn.Module) -> Storage:
        return self._whole.storage(layer)

    def form(self, layer: nn.Module) -> Form:
        return Form(self.rows.count, self._whole.form(layer).in_)

    def matrix(self, layer: nn.Module) -> Tensor:
        return self.rows.of(self._whole.matrix(layer), 0)

    def times(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self.rows.of(self._whole.times(layer, x))

    def bias(self, layer: nn.Module) -> Tensor | None:
        b = self._whole.bias(layer)
        return None if b is None else self.rows.of(b)

    def apply(self, layer: nn.Module, S: Operator, x: Tensor) -> Tensor:
        return self._whole.apply(layer, S, x)

    def add(self, layer: nn.Module, y: Tensor, S: Operator, x: Tensor) -> Tensor:
        return self._whole.add(layer, y, S, x)

    def plain(self, layer: nn.Module) -> Tensor | None:
        W = self._whole.plain(layer)
        return None if W is None else self.rows.of(W, 0)

    def forward(self, layer: Any, x: Any) -> Any:
        return self.forward_with(layer, self.matrix(layer), self.bias(layer), x)

    def forward_with(self, layer: nn.Module, matrix: Tensor, bias: Tensor | None, x: Any) -> Tensor:
        return self._whole.forward_with(layer, matrix, bias, x)
