"""The normal form of an adapted layer, W' = L (W R + Δ), and how equations build it.

A method writes its paper's formula on W with `+`, `*`, `compose` and `rotate`; what comes out is always this one form, so everything that crosses
methods (evaluation, merging, conversion) is written once, over four slots. The alternative, one forward per method, is what makes other
libraries long. `compose` is a function because torch.compile's tracer takes `+` and `*` on plain objects, but not `@`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..form import Form
from .base import Operator
from .dense import Dense
from .products import Product
from .sums import Sum


class FrozenMap(Protocol):
    """The frozen layer as a linear map: what an equation may ask of W."""

    @property
    def form(self) -> Form:
        """Its rows and columns."""
        ...

    def dense(self) -> Tensor:
        """The weight as an (out, in) tensor, read from its storage."""
        ...

    def operator(self) -> Operator:
        """The weight as an operator of numbers in float32 or wider, which may act without being read."""
        ...


@dataclass(eq=False)
class Adapted:
    """W' = L · (W · R + Δ) and b' = b, or L b, plus a shift; an empty slot is the identity (L, R) or zero (Δ, shift)."""

    W: FrozenMap
    R: Operator | None = None
    delta: Operator | None = None
    L: Operator | None = None
    scales_bias: bool = False
    """Whether L acts on the layer's bias too."""
    shift: Tensor | None = None
    """Added to the bias: (out,)."""

    @property
    def form(self) -> Form:
        """Rows and columns of W."""
        return self.W.form

    @property
    def additive(self) -> bool:
        """Whether W' = W + Δ."""
        return self.R is None and self.L is None

    def __add__(self, delta: Operator) -> Adapted:
        if self.L is not None:
            raise TypeError("an equation adds Δ before it multiplies from the left: L (W R + Δ)")
        delta = delta if self.delta is None else self.delta + delta
        return Adapted(self.W, self.R, delta, self.L, self.scales_bias, self.shift)

    def dense(self) -> Tensor:
        """W' as an (out, in) tensor in the widest of the types involved."""
        M = self.W.dense()
        if self.R is not None:
            M = self.R.right_of(M.to(wider(M, self.R)))
        if self.delta is not None:
            M = M + self.delta.dense()
        return M if self.L is None else self.L.left_of(M.to(wider(M, self.L)))

    def change(self) -> Operator | None:
        """W' − W; None where nothing of W changes.

        L (W R + Δ) − W = L Δ + (L − I) W + L W (R − I), each term with what structure it has.
        """
        terms: list[Operator] = [] if self.delta is None else [self._on_left(self.delta)]
        if self.L is not None:
            terms.append(Product(self.L.minus_identity(), Dense(self.W.dense())))
        if self.R is not None:
            terms.append(self._on_left(Product(Dense(self.W.dense()), self.R.minus_identity())))
        if not terms:
            return None
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def _on_left(self, S: Operator) -> Operator:
        return S if self.L is None else Product(self.L, S)

    def bias(self, b: Tensor | None) -> Tensor | None:
        """b' from the layer's own bias b."""
        if b is not None and self.scales_bias and self.L is not None:
            b = self.L.apply(b.to(wider(b, self.L)))
        if self.shift is None:
            return b
        return self.shift if b is None else b + self.shift


def compose(left: Operator | Adapted, right: Operator | Adapted) -> Adapted:
    """left · right, where one side is the equation so far and the other an operator.

    Raises:
        TypeError: both sides, or neither, are equations; or a rotation of the input would follow Δ or L, which the normal form cannot say.
    """
    if isinstance(right, Adapted) and isinstance(left, Operator):
        L = left if right.L is None else Product(left, right.L)
        return Adapted(right.W, right.R, right.delta, L, right.scales_bias, right.shift)
    if isinstance(left, Adapted) and isinstance(right, Operator):
        if not (left.additive and left.delta is None):
            raise TypeError("an equation multiplies from the right before anything else: L (W R + Δ)")
        return Adapted(left.W, right, left.delta, left.L, left.scales_bias, left.shift)
    raise TypeError(f"compose takes one equation and one operator, got {type(left).__name__} and {type(right).__name__}")


def rotate(W: Adapted, T: Operator) -> Adapted:
    """W T; of an embedding T W, because its features are its rows."""
    return compose(T, W) if W.form.lookup else compose(W, T)


@torch.no_grad()
def row_norms(V: Adapted) -> Tensor:
    """‖W + Δ‖ of every row, outside the graph, in float32 or wider: (out,).

    From the Gram form ‖W‖² + 2 Σ_j Δ_ij W_ij + ‖Δ‖², so that a structured Δ is never made dense.
    """
    if not V.additive:
        raise TypeError("row_norms takes W + Δ")
    W = V.W.operator()
    total = W.squared_row_norms()
    if V.delta is not None:
        delta = V.delta.to(total.dtype)
        total = total + 2 * delta.row_dot(W) + delta.squared_row_norms()
    return total.clamp_min(0).sqrt()


def wider(M: Tensor, S: Operator) -> torch.dtype:
    """The type that holds the numbers of both."""
    widest = M.dtype

    def look(t: Tensor) -> Tensor:
        nonlocal widest
        widest = torch.promote_types(widest, t.dtype)
        return t

    S.map(look)
    return widest
