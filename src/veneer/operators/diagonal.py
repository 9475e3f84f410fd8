"""Diagonal: one factor for every coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Cost, Operator


@dataclass(eq=False)
class Diagonal(Operator):
    """S = diag(d).

    Args:
        d: (…, n).
    """

    by_pieces: ClassVar[bool] = True

    d: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.d.shape[-1], self.d.shape[-1]

    def apply(self, x: Tensor) -> Tensor:
        batch = self.d.shape[:-1]
        return x * self.d.reshape(*batch, *(1,) * (x.dim() - 1 - len(batch)), -1)

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        if dx is not None:
            dx.addcmul_(dy, self.d)
        return ((dy * x).sum(0),)

    def transpose(self) -> Diagonal:
        return self

    def scaled(self, s: float) -> Diagonal:
        return Diagonal(s * self.d)

    def minus_identity(self) -> Diagonal:
        return Diagonal(self.d - 1)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.d)

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        n = self.shape[0]
        return Cost(tokens * n, itemsize * (2 * tokens * n + n))
