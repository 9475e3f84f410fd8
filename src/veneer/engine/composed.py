"""y = L (W (R x) + Δ x) + b composed of autograd's own operations: for every kind of layer, several adapters at once, and compilers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import Adapted, ByRows, Diagonal, Operator, traced
from .masks import mask_of

Term = tuple[Adapted | ByRows, float]
"""An adapter's equation, and the share of its change's input that is zeroed."""


def composed(layer: Any, kind: Any, terms: list[Term], x: Tensor) -> Tensor:
    """The output of one layer, or of a part of it, with some adapters."""
    seen = [dropped(x, p, (id(layer), i)) if p and x.is_floating_point() else x for i, (_, p) in enumerate(terms)]
    if len(terms) == 1 and (terms[0][0].additive or seen[0] is x):
        return _adapted(layer, kind, terms[0][0], x, seen[0])
    y = kind.forward(layer, x)
    for (equation, _), s in zip(terms, seen, strict=True):
        if equation.additive and isinstance(equation, Adapted):
            y = _add(layer, kind, y, equation, s)
            if equation.shift is not None:
                y = y + kind.spread(layer, equation.shift.to(y.dtype))
        else:
            # What is dropped is the input of the change W' − W, so W meets both the whole input and the dropped one.
            y = y + (_adapted(layer, kind, equation, s, s) - kind.forward(layer, s))
    return y


def by_rows(layer: Any, kind: Any, whole: ByRows, outputs: list[Tensor], x: Tensor) -> Tensor:
    """The whole output from those of the adapted parts, and from the frozen rows between them.

    Args:
        outputs: of the parts, in their order.
    """
    rows = whole.parts[0][0]
    groups = rows.groups
    found = {part.start: (part.width, y) for (part, _), y in zip(whole.parts, outputs, strict=True)}
    pieces, at = [], 0
    for start in [*sorted(found), rows.period]:
        if start > at:
            between = kind.part(type(rows)(groups, rows.period, at, start - at))
            pieces.append(between.forward(layer, x).unflatten(-1, (groups, start - at)))
            at = start
        if start in found:
            width, y = found[start]
            pieces.append(y.unflatten(-1, (groups, width)))
            at += width
    return torch.cat(pieces, -1).flatten(-2)


def dropped(x: Tensor, p: float, reader: Hashable) -> Tensor:
    """x with a share p of its numbers zeroed, and the others scaled up."""
    # The tracer cannot follow a generator of its own, and there the partitioner decides what is kept; sharded and other special tensors draw in their own way.
    return F.dropout(x, p) if traced() or type(x) is not Tensor else x * mask_of(x, p, reader)[1].keep(x.dtype).view(x.shape) / (1 - p)


def _adapted(layer: Any, kind: Any, equation: Adapted | ByRows, x: Tensor, dropped: Tensor) -> Tensor:
    """L (W (R x) + Δ dropped) + b."""
    if isinstance(equation, ByRows):
        outputs = [_adapted(layer, kind.part(rows), e, x, dropped) for rows, e in equation.parts]
        return by_rows(layer, kind, equation, outputs, x)
    if equation.R is None:
        y = kind.forward(layer, x)
    elif kind.rotates_input:
        y = kind.forward(layer, kind.apply(layer, equation.R.to(x.dtype), x))
    else:
        y = kind.forward_with(layer, Adapted(equation.W, R=equation.R).dense(), kind.bias(layer), x)
    y = _add(layer, kind, y, equation, dropped)
    if equation.L is not None:
        y = _scale(layer, kind, y, equation.L, equation.scales_bias)
    return y if equation.shift is None else y + kind.spread(layer, equation.shift.to(y.dtype))


def _add(layer: Any, kind: Any, y: Tensor, equation: Adapted, x: Tensor) -> Tensor:
    # y's type is the layer's compute type (autocast's, where that is on), so the small factors are cast and never the activations.
    if equation.delta is not None:
        x = x if x.dtype == y.dtype or not x.is_floating_point() else x.to(y.dtype)
        y = kind.add(layer, y, equation.delta.to(y.dtype), x)
    return y


def _scale(layer: Any, kind: Any, y: Tensor, L: Operator, scales_bias: bool) -> Tensor:
    """L y, or L (y − b) + b where the bias is not scaled."""
    b = None if scales_bias else kind.bias(layer)
    if isinstance(L, Diagonal):
        # L y = y + (L − 1) y: in half precision 1 + ε rounds to 1, but ε itself does not.
        offset = kind.spread(layer, (L.d - 1).to(y.dtype))
        return torch.addcmul(y, y if b is None else y - kind.spread(layer, b.to(y.dtype)), offset)
    L = L.to(y.dtype)
    z = kind.on_output(layer, L, y)
    if b is not None:
        z = z + kind.spread(layer, b.to(y.dtype) - L.apply(b.to(y.dtype)))
    return z.to(y.dtype)
