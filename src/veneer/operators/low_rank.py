"""Low rank: B A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Cost, Operator, times, traced


@dataclass(eq=False)
class LowRank(Operator):
    """S = B A of rank at most r; `r (in + out)` numbers stand for `in · out`.

    Args:
        B: (…, out, r).
        A: (…, r, in).

    >>> import torch
    >>> LowRank(torch.ones(3, 1), torch.ones(1, 2)).apply(torch.ones(5, 2)).shape
    torch.Size([5, 3])
    """

    by_pieces: ClassVar[bool] = True
    keeps: ClassVar[int] = 1

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[-2], self.A.shape[-1]

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[-2]

    def apply(self, x: Tensor) -> Tensor:
        return times(times(x, self.A), self.B)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        h = times(x, self.A)  # (…, r)
        if self.B.dim() == y.dim() == 3 and y.is_contiguous() and not traced():
            return y.baddbmm_(h, self.B.mT)
        if self.B.dim() > 2 or not y.is_contiguous() or traced():
            return y + times(h, self.B)
        # Accumulating into y saves the pass over a tokens × out tensor that a separate sum would cost; a compiler puts the sum into the next pass.
        return y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), self.B.mT).view(y.shape)

    def columns(self, ids: Tensor) -> Tensor:
        return times(F.embedding(ids, self.A.mT), self.B)

    def low_rank(self) -> LowRank:
        return self

    def accumulate(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        h = x @ self.A.mT
        y.addmm_(h, self.B.mT)
        return (h,)

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        # h = A x, dh = Bᵀ dy;  dB = dy hᵀ,  dA = dh xᵀ,  dx = Aᵀ dh.
        h = kept[0] if kept else x @ self.A.mT
        dh = dy @ self.B
        if dx is not None:
            dx.addmm_(dh, self.A)
        return (h.mT @ dy).mT, dh.mT @ x  # a wide short product is a third faster than a tall narrow one

    def gradients_of_dense(self, G: Tensor) -> tuple[Tensor, ...]:
        return G @ self.A.mT, self.B.mT @ G

    def added_to(self, M: Tensor, *, own: bool = False) -> Tensor:
        return M.addmm_(self.B, self.A) if own else torch.addmm(M, self.B, self.A)

    def cost_of_adding(self, itemsize: int = 4) -> Cost:
        out, in_ = self.shape
        # W is read, and W' written, read and written; a fresh tensor's pages are also zeroed by the system.
        return Cost(2 * self.rank * in_ * out, itemsize * (5 * in_ * out + self.rank * (in_ + out)))

    def transpose(self) -> LowRank:
        return LowRank(self.A.mT, self.B.mT)

    def rows_scaled(self, d: Tensor) -> LowRank:
        return LowRank(d.unsqueeze(-1) * self.B, self.A)

    def scaled(self, s: float) -> LowRank:
        if self.B.numel() <= self.A.numel():
            return LowRank(s * self.B, self.A)
        return LowRank(self.B, s * self.A)

    def dense(self) -> Tensor:
        return self.B @ self.A

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        out, in_ = self.shape
        return Cost(2 * tokens * self.rank * (in_ + out), itemsize * (tokens * (in_ + 2 * self.rank + 2 * out) + self.rank * (in_ + out)))

    def cost_of_dx(self, tokens: int, itemsize: int = 4) -> Cost:
        in_ = self.shape[1]
        return Cost(2 * tokens * self.rank * in_, 2 * itemsize * tokens * in_)

    def cost_of_again(self, tokens: int, itemsize: int = 4) -> Cost:
        in_ = self.shape[1]
        return Cost(2 * tokens * self.rank * in_, itemsize * tokens * in_)

    def row_dot(self, W: Operator | Tensor) -> Tensor:
        # Σ_j (BA)_ij W_ij = Σ_k B_ik (W Aᵀ)_ik: W is read once, B A never formed.
        if not isinstance(W, Tensor):
            WAt = W.apply(self.A).mT
        elif W.dim() == 2 < self.A.dim():
            WAt = times(self.A, W).mT  # of a batch in one product, because it is the same W
        else:
            WAt = W @ self.A.mT
        return (self.B * WAt).sum(-1)

    def squared_row_norms(self) -> Tensor:
        return ((self.B @ (self.A @ self.A.mT)) * self.B).sum(-1)


def concatenate(terms: Sequence[LowRank]) -> LowRank:
    """The sum of low-rank maps as one, whose rank is the sum of theirs."""
    return LowRank(torch.cat([t.B for t in terms], -1), torch.cat([t.A for t in terms], -2))
