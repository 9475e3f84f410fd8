"""Block diagonal, and butterflies, which collapse to it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import autocasting
from .base import Cost, Operator, pieces, product, traced
from .rotations import gram_error
from .tables import table

WIDE = 32
"""Smaller blocks are put together to this size: a product with 8 × 8 blocks takes longer than with 32 × 32, four times the operations and all."""


@dataclass(eq=False)
class BlockDiagonal(Operator):
    """diag(S_1 … S_n), one product per block.

    Args:
        blocks: (…, n, b, b); n copies of one shared block may be an expanded view.
    """

    by_pieces: ClassVar[bool] = True

    blocks: Tensor

    def __post_init__(self) -> None:
        self._wide: BlockDiagonal | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, b = self.blocks.shape[-3:-1]
        return n * b, n * b

    def apply(self, x: Tensor) -> Tensor:
        blocks = self.wide().blocks
        *batch, n, b, _ = blocks.shape
        rows = x.reshape(*batch, prod(x.shape[len(batch) : -1]), n, b)
        return product(rows.transpose(-3, -2), blocks.mT).transpose(-3, -2).reshape(x.shape)

    def right_of(self, M: Tensor) -> Tensor:
        # As (Sᵀ Mᵀ)ᵀ, whose blocks lie in memory as the product leaves them: rows would take a copy that turns them back.
        blocks = self.wide().blocks
        if blocks.dim() > 3 or M.dim() > 2:
            return super().right_of(M)
        n, b, _ = blocks.shape
        return torch.bmm(blocks.mT, M.view(-1, n, b).permute(1, 2, 0)).flatten(0, 1).mT

    def wide(self) -> BlockDiagonal:
        """The same map in blocks of up to WIDE numbers."""
        followed = torch.is_grad_enabled() and self.blocks.requires_grad
        if self._wide is None or self._wide.blocks.requires_grad is not followed:
            n, b = self.blocks.shape[-3:-1]
            k = next((k for k in range(WIDE // b, 1, -1) if n % k == 0), 1)
            if k == 1:
                return self
            self._wide = BlockDiagonal(_placed(self.blocks, k * b, _placing(b, k * b, 1, self.blocks.device)[0]))
        return self._wide

    def overwrite(self, x: Tensor) -> Tensor:
        blocks = self.wide().blocks
        n, b, _ = blocks.shape
        for rows in pieces(x):
            part = x[rows].view(-1, n, b)
            part.copy_(torch.bmm(part.transpose(0, 1), blocks.mT).transpose(0, 1))
        return x

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        (n, b, _), (N, B, _) = self.blocks.shape, self.wide().blocks.shape
        if dx is not None:
            dx += self.transpose().apply(dy)
        G = torch.bmm(dy.view(-1, N, B).permute(1, 2, 0), x.view(-1, N, B).transpose(0, 1))
        if n == N:
            return (G,)
        return (torch.diagonal(G.view(N, n // N, b, n // N, b), dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(n, b, b),)

    def transpose(self) -> BlockDiagonal:
        found = BlockDiagonal(self.blocks.mT)
        if self._wide is not None:
            found._wide = BlockDiagonal(self._wide.blocks.mT)
        return found

    def scaled(self, s: float) -> BlockDiagonal:
        return BlockDiagonal(s * self.blocks)

    def dense(self) -> Tensor:
        spread = torch.diag_embed(self.blocks.movedim(-3, -1), dim1=-4, dim2=-2)  # (…, n, b, n, b)
        return spread.reshape(*self.blocks.shape[:-3], *self.shape)

    def minus_identity(self) -> BlockDiagonal:
        return BlockDiagonal(self.blocks - torch.eye(self.blocks.shape[-1], dtype=self.blocks.dtype, device=self.blocks.device))

    def orthogonality_error(self) -> float:
        return gram_error(self.blocks)

    def drop_blocks(self, p: float) -> BlockDiagonal:
        """int(p n) blocks become the identity."""
        return BlockDiagonal(_with_identities(self.blocks, p))

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        n, b = self.blocks.shape[-3:-1]
        return Cost(2 * tokens * n * b * b, itemsize * (2 * tokens * n * b + n * b * b))


@dataclass(eq=False)
class Butterfly(Operator):
    """S_m ⋯ S_2 S_1 with S_i = P_i diag(blocks_i) P_iᵀ, where P_i gathers, in chunks of b 2^(i−1) numbers, first the even and then the odd half blocks.

    S_i mixes nothing across its chunks, so the whole is block diagonal with blocks of b 2^(m−1), and is applied as that: the factors meet each other
    on (in × block) numbers, once, and never the tokens (arXiv:2311.06243, §4; the permutations are those of the file format).

    Args:
        blocks: (…, m, n, b, b).
        transposed: the transpose of that product instead.
    """

    blocks: Tensor
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        n, b = self.blocks.shape[-3:-1]
        return n * b, n * b

    def collapsed(self) -> BlockDiagonal:
        """The same map with one block for each chunk of the last factor."""
        *_, m, _, b, _ = self.blocks.shape
        wide = b << (m - 1)
        with autocasting.off(self.blocks.device):
            M = _collapsed(self.blocks, wide)[0] if traced() else Collapse.apply(self.blocks, wide)
        return BlockDiagonal(M.mT if self.transposed else M)

    def for_tokens(self) -> BlockDiagonal:
        return self.collapsed()

    def apply(self, x: Tensor) -> Tensor:
        return self.collapsed().apply(x)

    def transpose(self) -> Butterfly:
        return Butterfly(self.blocks, not self.transposed)

    def scaled(self, s: float) -> BlockDiagonal:
        return self.collapsed().scaled(s)

    def dense(self) -> Tensor:
        return self.collapsed().dense()

    def minus_identity(self) -> BlockDiagonal:
        return self.collapsed().minus_identity()

    def orthogonality_error(self) -> float:
        return self.collapsed().orthogonality_error()

    def drop_blocks(self, p: float) -> Butterfly:
        """int(p n) blocks of one factor, drawn at random, become the identity."""
        m = self.blocks.shape[-4]
        here = (torch.arange(m, device=self.blocks.device) == torch.randint(m, (), device=self.blocks.device)).view(m, 1, 1, 1)
        return Butterfly(torch.where(here, _with_identities(self.blocks, p), self.blocks), self.transposed)

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        *_, m, n, b, _ = self.blocks.shape
        wide = b << (m - 1)
        build = Cost(2 * (m - 1) * n * b * b * wide, itemsize * 2 * m * n * b * wide)
        return build + Cost(2 * tokens * n * b * wide, itemsize * (2 * tokens * n * b + n * b * wide))


def _collapsed(blocks: Tensor, wide: int) -> tuple[Tensor, list[Tensor]]:
    """The factors multiplied out, (…, N, wide, wide), and what each factor but the first met."""
    m, b = blocks.shape[-4], blocks.shape[-1]
    M = _placed(blocks.select(-4, 0), wide, _placing(b, wide, min(m, 2), blocks.device)[0])
    met = []
    for i in range(1, m):
        met.append(M.unflatten(-2, (wide // b, b)))
        M = (_of_chunks(blocks, i, wide) @ met[-1]).flatten(-3, -2).index_select(-2, _turning(b, wide, i, m, blocks.device)[0])
    return M, met


def _of_chunks(blocks: Tensor, i: int, wide: int) -> Tensor:
    """The blocks of one factor by the chunks of the last: (…, m, n, b, b) → (…, N, wide / b, b, b)."""
    return blocks.select(-4, i).unflatten(-3, (-1, wide // blocks.shape[-1]))


def _placed(blocks: Tensor, wide: int, places: Tensor) -> Tensor:
    """Block diagonal matrices of (wide, wide) numbers, which are taken from `places`: (…, n, b, b) → (…, N, wide, wide)."""
    flat = blocks.reshape(*blocks.shape[:-3], -1, wide * blocks.shape[-1])
    return F.pad(flat, (0, 1)).index_select(-1, places).unflatten(-1, (wide, wide))


@table
def _placing(b: int, wide: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each number of a block diagonal (wide, wide) matrix its place among those of its blocks, the place behind the last for a zero; and the reverse.

    The rows are in the order in which a second factor takes them, where m is 2.
    """
    order, inverse = (_order(b, wide, m - 1, back, device) for back in (False, True))
    row, column = order.unsqueeze(-1), _order(b, wide, 0, False, device)
    places = torch.where(row // b == column // b, row * b + column % b, wide * b)
    back = inverse.unsqueeze(-1) * wide + (column.unsqueeze(-1) // b) * b + torch.arange(b, device=device)
    return places.flatten(), back.flatten()


@table
def _turning(b: int, wide: int, i: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows that come out of the i-th factor in the order in which the next takes them, or of the features behind the last; and the reverse."""
    after = (i + 1) % m
    there = _order(b, wide, i, True, device)[_order(b, wide, after, False, device)]
    return there, _order(b, wide, after, True, device)[_order(b, wide, i, False, device)]


def _order(b: int, wide: int, i: int, back: bool, device: torch.device) -> Tensor:
    """The features in the order of the rows of P_iᵀ, or back; i counts from 0, where P is the identity."""
    features = torch.arange(wide, device=device)
    if i == 0:
        return features
    halves = (1 << i, 2) if back else (2, 1 << i)
    return features.view(-1, *halves, b // 2).transpose(1, 2).reshape(-1)


class Collapse(torch.autograd.Function):
    """The factors multiplied out, of which backward makes what each has met again, instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, wide: int) -> Tensor:
        ctx.save_for_backward(blocks)
        return _collapsed(blocks, wide)[0]

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        (blocks,) = ctx.saved_tensors
        m, n, b, _ = blocks.shape[-4:]
        wide = G.shape[-1]
        _, met = _collapsed(blocks, wide)
        found = []
        for i in range(m - 1, 0, -1):
            dM = G.index_select(-2, _turning(b, wide, i, m, G.device)[1]).unflatten(-2, (wide // b, b))
            found.append((dM @ met[i - 1].mT).flatten(-4, -3))
            G = (_of_chunks(blocks, i, wide).mT @ dM).flatten(-3, -2)
        back = _placing(b, wide, min(m, 2), G.device)[1]
        found.append(G.flatten(-2).index_select(-1, back).reshape(*blocks.shape[:-4], n, b, b))
        return torch.stack(found[::-1], -4), None


def _with_identities(blocks: Tensor, p: float) -> Tensor:
    """(…, n, b, b) with int(p n) of the n blocks, the same in every batch, replaced by the identity."""
    n, b = blocks.shape[-3:-1]
    chosen = torch.rand(n, device=blocks.device).argsort() < int(p * n)
    eye = torch.eye(b, dtype=blocks.dtype, device=blocks.device)
    return torch.where(chosen.view(n, 1, 1), eye, blocks)
