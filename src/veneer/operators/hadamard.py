"""Hadamard: the elementwise product of two maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Cost, Operator, times
from .low_rank import LowRank


@dataclass(eq=False)
class Hadamard(Operator):
    """S ∘ T. Of two maps of ranks r₁ and r₂ it is itself a map of rank r₁ r₂: row (i, j) of its A is A₁_i ∘ A₂_j (Khatri-Rao).

    Args:
        S: (out × in).
        T: (out × in).
    """

    S: Operator
    T: Operator

    def __post_init__(self) -> None:
        self._holds = False
        self._dense: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.S.shape

    def low_rank(self) -> LowRank | None:
        S, T = self.S.low_rank(), self.T.low_rank()
        if S is None or T is None:
            return None
        return LowRank(_khatri_rao(S.B.mT, T.B.mT).mT, _khatri_rao(S.A, T.A))

    def for_tokens(self) -> Operator:
        # Three products with the factors, forward and backward, against the dense matrix and its gradient.
        if not isinstance(self.S, LowRank) or not isinstance(self.T, LowRank):
            return self
        out, in_ = self.shape
        factors = self.low_rank() if 3 * self.S.rank * self.T.rank * (out + in_) < out * in_ else None
        return self if factors is None else factors

    def apply(self, x: Tensor) -> Tensor:
        meets = self.for_tokens()
        return times(x, self.dense()) if meets is self else meets.apply(x)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        meets = self.for_tokens()
        return y + self.apply(x) if meets is self else meets.add_to(y, x)

    def accumulate(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y.addmm_(x, self.dense().mT)
        return ()

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        if dx is not None:
            dx.addmm_(dy, self.dense())
        return self.gradients_of_dense(dy.mT @ x)

    def gradients_of_dense(self, G: Tensor) -> tuple[Tensor, ...]:
        S, T = self._parts()
        if _is_product(self.T):
            self._dense = None  # T becomes G ∘ T in its place
            T = T.mul_(G)
        else:
            T = G * T
        of_S = self.S.gradients_of_dense(T)
        return of_S + self.T.gradients_of_dense(G.mul_(S))

    def holding(self) -> Hadamard:
        self._holds = True
        return self

    def _parts(self) -> tuple[Tensor, Tensor]:
        parts = (self.S.dense(), self.T.dense()) if self._dense is None else self._dense
        self._dense = parts if self._holds else None
        return parts

    def added_to(self, M: Tensor, *, own: bool = False) -> Tensor:
        S, T = self._parts()
        if torch.is_grad_enabled():
            return torch.addcmul(M, S, T)
        free = S if _is_product(self.S) and not self._holds else None
        return torch.addcmul(M, S, T, out=M if own else free)

    def cost_of_adding(self, itemsize: int = 4) -> Cost:
        out, in_ = self.shape
        return self.S.cost_of_adding(itemsize) + self.T.cost_of_adding(itemsize) + Cost(2 * out * in_, 4 * itemsize * out * in_)

    def columns(self, ids: Tensor) -> Tensor:
        return self.S.columns(ids) * self.T.columns(ids)

    def transpose(self) -> Hadamard:
        return Hadamard(self.S.transpose(), self.T.transpose())

    def scaled(self, s: float) -> Hadamard:
        return Hadamard(self.S.scaled(s), self.T)

    def dense(self) -> Tensor:
        return self.S.dense() * self.T.dense()

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        meets = self.for_tokens()
        if meets is not self:
            return meets.cost(tokens, itemsize)
        out, in_ = self.shape
        build = self.S.cost(in_, itemsize) + self.T.cost(in_, itemsize)
        return build + Cost(out * in_ * (1 + 2 * tokens), itemsize * (tokens * (in_ + out) + 3 * in_ * out))


def _is_product(S: Operator) -> bool:
    """Whether S's dense matrix is made anew, so that it may be overwritten."""
    return isinstance(S, LowRank)


def _khatri_rao(X: Tensor, Y: Tensor) -> Tensor:
    """Every row of X times every row of Y, elementwise: (…, r₁, n), (…, r₂, n) → (…, r₁ r₂, n). Of columns the transposes are taken: sums over long rows are fast."""
    return (X.unsqueeze(-2) * Y.unsqueeze(-3)).flatten(-3, -2)
