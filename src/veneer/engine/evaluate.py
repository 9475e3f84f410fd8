"""Evaluate y = L (W (R x) + Δ x) + b for the active adapters of one layer.

Split: the layer's own forward, then the change accumulated into its output; W is never read, nothing is kept for backward that the frozen
layer does not keep, save x itself and tokens × r numbers. Merged: build W' once and do one product. Both are the same equation, which the law suite
holds them to; `strategy` chooses by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import Adapted, Diagonal, Operator


class Strategy(StrEnum):
    """How an equation becomes an output."""

    SPLIT = "split"
    MERGED = "merged"


# A plain global: torch.compile guards on it, whereas it cannot trace a context variable.
_strategy = Strategy.SPLIT


@contextmanager
def strategy(name: Strategy | str) -> Iterator[None]:
    """Choose the strategy of every adapted layer of this process inside the block.

    >>> with strategy("merged"):
    ...     pass
    """
    global _strategy
    before, _strategy = _strategy, Strategy(name)
    try:
        yield
    finally:
        _strategy = before


class Layer(Protocol):
    """What the engine asks of an adapted layer."""

    veneer_kind: Any
    training: bool

    def base_forward(self, x: Tensor) -> Tensor: ...

    def equations(self) -> list[tuple[Adapted, float]]: ...


def evaluate(layer: Layer, x: Tensor) -> Tensor:
    """The output of an adapted layer: W'x + b, or W x + b + Σ (W'_i − W) x for several adapters."""
    terms = layer.equations()
    if _strategy is Strategy.MERGED and not any(p for _, p in terms if layer.training):
        return _merged(layer, [e for e, _ in terms], x)
    return _split(layer, terms, x)


def _merged(layer: Layer, equations: list[Adapted], x: Tensor) -> Tensor:
    matrix = equations[0].dense()
    for e in equations[1:]:
        matrix = matrix + (e.dense() - e.W.dense())
    return layer.veneer_kind.forward_with(layer, matrix, x).to(x.dtype)


def _split(layer: Layer, terms: list[tuple[Adapted, float]], x: Tensor) -> Tensor:
    dropped = [F.dropout(x, p, layer.training) if p else x for _, p in terms]
    if len(terms) == 1 and (terms[0][0].additive or dropped[0] is x):
        return _adapted(layer, terms[0][0], x, dropped[0])
    y = layer.base_forward(x)
    for (equation, _), seen in zip(terms, dropped, strict=True):
        if equation.additive:
            y = _add_change(layer, y, equation, seen)
        else:
            # Dropout is of the input of the change W' − W, so W meets both the whole input and the dropped one.
            y = y + (_adapted(layer, equation, seen, seen) - layer.base_forward(seen))
    return y


def _adapted(layer: Layer, equation: Adapted, x: Tensor, dropped: Tensor) -> Tensor:
    """L (W (R x) + Δ dropped) + b."""
    kind = layer.veneer_kind
    z = x if equation.R is None else kind.rotate_input(layer, equation.R.to(x.dtype), x)
    y = layer.base_forward(z)
    y = _add_change(layer, y, equation, dropped)
    return y if equation.L is None else _scale(layer, y, equation.L)


def _add_change(layer: Layer, y: Tensor, equation: Adapted, x: Tensor) -> Tensor:
    if equation.delta is None:
        return y
    # y's type is the layer's compute type (autocast's, where that is on), so the small factors are cast and never the activations.
    x = x if x.dtype == y.dtype else x.to(y.dtype)
    return layer.veneer_kind.add_change(layer, y, equation.delta.to(y.dtype), x)


def _scale(layer: Layer, y: Tensor, L: Operator) -> Tensor:
    if not isinstance(L, Diagonal) or y.dtype == L.d.dtype:
        return layer.veneer_kind.scale_output(layer, y, L.to(y.dtype))
    # L y = y + (L − 1) y: in half precision 1 + ε rounds to 1, but ε itself does not.
    b = layer.veneer_kind.bias(layer)
    offset = (L.d - 1).to(y.dtype)
    return torch.addcmul(y, y if b is None else y - b.to(y.dtype), offset)
