"""Diagonal: one factor for every coordinate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Cost, Operator


@dataclass(eq=False)
class Diagonal(Operator):
    """S = diag(d).

    Args:
        d: (…, n).
    """

    d: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.d.shape[-1], self.d.shape[-1]

    def _row(self) -> Tensor:
        return self.d if self.d.dim() == 1 else self.d.unsqueeze(-2)

    def apply(self, x: Tensor) -> Tensor:
        return x * self._row()

    def transpose(self) -> Diagonal:
        return self

    def scaled(self, s: float) -> Diagonal:
        return Diagonal(s * self.d)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.d)

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        n = self.shape[0]
        return Cost(tokens * n, itemsize * (2 * tokens * n + n))
