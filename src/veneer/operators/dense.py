"""Dense: a matrix with no structure to use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Cost, Operator, times


@dataclass(eq=False)
class Dense(Operator):
    """S = M.

    Args:
        M: (…, out, in).
    """

    M: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.M.shape[-2], self.M.shape[-1]

    def apply(self, x: Tensor) -> Tensor:
        return times(x, self.M)

    def accumulate(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y.addmm_(x, self.M.mT)
        return ()

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        if dx is not None:
            dx.addmm_(dy, self.M)
        return (dy.mT @ x,)

    def gradients_of_dense(self, G: Tensor) -> tuple[Tensor, ...]:
        return (G,)

    def cost_of_adding(self, itemsize: int = 4) -> Cost:
        out, in_ = self.shape
        return Cost(in_ * out, 3 * itemsize * in_ * out)

    def transpose(self) -> Dense:
        return Dense(self.M.mT)

    def scaled(self, s: float) -> Dense:
        return Dense(s * self.M)

    def dense(self) -> Tensor:
        return self.M

    def squared_row_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.M, dim=-1).square()

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        out, in_ = self.shape
        return Cost(2 * tokens * in_ * out, itemsize * (tokens * (in_ + out) + in_ * out))
