"""Hadamard: the elementwise product of two maps."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def shape(self) -> tuple[int, int]:
        return self.S.shape

    def low_rank(self) -> LowRank | None:
        S, T = self.S.low_rank(), self.T.low_rank()
        if S is None or T is None:
            return None
        A = (S.A.unsqueeze(-2) * T.A.unsqueeze(-3)).flatten(-3, -2)
        B = (S.B.unsqueeze(-1) * T.B.unsqueeze(-2)).flatten(-2)
        return LowRank(B, A)

    def factors(self) -> LowRank | None:
        # Three products with them, forward and backward, against the dense matrix and its gradient.
        if not isinstance(self.S, LowRank) or not isinstance(self.T, LowRank):
            return None
        out, in_ = self.shape
        return self.low_rank() if 3 * self.S.rank * self.T.rank * (out + in_) < out * in_ else None

    def apply(self, x: Tensor) -> Tensor:
        factors = self.factors()
        return times(x, self.dense()) if factors is None else factors.apply(x)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        factors = self.factors()
        return y + self.apply(x) if factors is None else factors.add_to(y, x)

    def columns(self, ids: Tensor) -> Tensor:
        return self.S.columns(ids) * self.T.columns(ids)

    def transpose(self) -> Hadamard:
        return Hadamard(self.S.transpose(), self.T.transpose())

    def scaled(self, s: float) -> Hadamard:
        return Hadamard(self.S.scaled(s), self.T)

    def dense(self) -> Tensor:
        return self.S.dense() * self.T.dense()

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        factors = self.factors()
        if factors is not None:
            return factors.cost(tokens, itemsize)
        out, in_ = self.shape
        build = self.S.cost(in_, itemsize) + self.T.cost(in_, itemsize)
        return build + Cost(out * in_ * (1 + 2 * tokens), itemsize * (tokens * (in_ + out) + 3 * in_ * out))
