"""Products, and the identity plus a small map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Cost, Operator
from .diagonal import Diagonal
from .low_rank import LowRank


@dataclass(eq=False)
class Product(Operator):
    """S T.

    Args:
        S: (out × k).
        T: (k × in).
    """

    S: Operator
    T: Operator

    @property
    def shape(self) -> tuple[int, int]:
        return self.S.shape[0], self.T.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        return self.S.apply(self.T.apply(x))

    def factors(self) -> tuple[Operator, ...]:
        return self.S.factors() + self.T.factors()

    def low_rank(self) -> LowRank | None:
        S, T = self.S.low_rank(), self.T.low_rank()
        if T is not None and (S is None or T.rank <= S.rank):
            return LowRank(self.S.left_of(T.B), T.A)
        return None if S is None else LowRank(S.B, self.T.right_of(S.A))

    def for_tokens(self) -> Operator:
        S, T = self.S.for_tokens(), self.T.for_tokens()
        return T.rows_scaled(S.d) if isinstance(S, Diagonal) else Product(S, T)

    def columns(self, ids: Tensor) -> Tensor:
        return self.S.apply(self.T.columns(ids))

    def transpose(self) -> Product:
        return Product(self.T.transpose(), self.S.transpose())

    def scaled(self, s: float) -> Product:
        return Product(self.S.scaled(s), self.T)

    def dense(self) -> Tensor:
        return self.S.left_of(self.T.dense())

    def drop_blocks(self, p: float) -> Product:
        """Of both factors."""
        return Product(self.S.drop_blocks(p), self.T.drop_blocks(p))

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        return self.T.cost(tokens, itemsize) + self.S.cost(tokens, itemsize)


@dataclass(eq=False)
class IdentityPlus(Operator):
    """I + S.

    Args:
        S: (n × n).
    """

    S: Operator

    @property
    def shape(self) -> tuple[int, int]:
        return self.S.shape

    def apply(self, x: Tensor) -> Tensor:
        return x + self.S.apply(x)

    def for_tokens(self) -> IdentityPlus:
        return IdentityPlus(self.S.for_tokens())

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        if dx is not None:
            dx += dy
        return self.S.gradients(x, dy, dx)

    def transpose(self) -> IdentityPlus:
        return IdentityPlus(self.S.transpose())

    def minus_identity(self) -> Operator:
        return self.S

    def scaled(self, s: float) -> Operator:
        raise NotImplementedError("s (I + S) is no I + S; scale what it is composed with")

    def dense(self) -> Tensor:
        S = self.S.dense()
        return torch.eye(self.shape[0], dtype=S.dtype, device=S.device) + S

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        n = self.shape[0]
        return self.S.cost(tokens, itemsize) + Cost(tokens * n, itemsize * 2 * tokens * n)
