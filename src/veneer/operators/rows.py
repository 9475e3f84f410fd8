"""Some of a matrix' rows: where the parts of a fused projection lie, and maps into and out of them.

Every layout in use is the same picture: the rows fall into equal groups (one, the heads, groups of heads that share keys), and a part is the same stretch of each group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .base import Cost, Operator
from .low_rank import LowRank
from .truncation import Spectrum


@dataclass(frozen=True)
class Rows:
    """The rows `g · period + start + j` for g < groups, j < width.

    >>> import torch
    >>> Rows(groups=2, period=6, start=2, width=2).of(torch.arange(12)).tolist()
    [2, 3, 8, 9]
    """

    groups: int
    period: int
    start: int
    width: int

    @property
    def count(self) -> int:
        """How many they are."""
        return self.groups * self.width

    @property
    def total(self) -> int:
        """How many rows the matrix has."""
        return self.groups * self.period

    def view(self, t: Tensor, dim: int = -1) -> Tensor:
        """The part of t along a dimension, as two dimensions (groups, width) in its place; a view."""
        dim %= t.dim()
        return t.unflatten(dim, (self.groups, self.period)).narrow(dim + 1, self.start, self.width)

    def of(self, t: Tensor, dim: int = -1) -> Tensor:
        """The part of t along a dimension; a view where there is one group."""
        dim %= t.dim()
        return t.narrow(dim, self.start, self.width) if self.groups == 1 else self.view(t, dim).flatten(dim, dim + 1)

    def spread(self, t: Tensor, fill: float = 0.0) -> Tensor:
        """(…, count) → (…, total): t where the part lies, `fill` elsewhere."""
        ends = (self.start, self.period - self.start - self.width)
        return F.pad(t.unflatten(-1, (self.groups, self.width)), ends, value=fill).flatten(-2)


@dataclass(eq=False)
class IntoRows(Operator):
    """Eᵀ S: S's output in some of the rows of a larger matrix, and 0 in the others.

    Args:
        S: (rows.count × in).
    """

    S: Operator
    rows: Rows

    @property
    def by_pieces(self) -> bool:  # type: ignore[override]  # what S says
        return self.S.by_pieces

    @property
    def keeps(self) -> int:  # type: ignore[override]  # what S says
        return self.S.keeps

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.total, self.S.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        return self.rows.spread(self.S.apply(x))

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        part = self.rows.view(y)
        part += self.S.apply(x).unflatten(-1, part.shape[-2:])
        return y

    def columns(self, ids: Tensor) -> Tensor:
        return self.rows.spread(self.S.columns(ids))

    def low_rank(self) -> LowRank | None:
        S = self.S.low_rank()
        return None if S is None else LowRank(self.rows.spread(S.B.mT).mT, S.A)

    def spectrum(self) -> Spectrum:
        own = self.S.spectrum()

        def vectors(k: int) -> tuple[Tensor, Tensor]:
            U, Vh = own.vectors(k)
            return self.rows.spread(U.mT).mT, Vh

        return Spectrum(own.s, vectors)

    def for_tokens(self) -> IntoRows:
        return IntoRows(self.S.for_tokens(), self.rows)

    def accumulate(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        if self.rows.groups == 1:
            return self.S.accumulate(self.rows.of(y), x)
        part = self.rows.of(y)
        kept = self.S.accumulate(part, x)
        own = self.rows.view(y)
        own.copy_(part.view(own.shape))
        return kept

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        return self.S.gradients(x, self.rows.of(dy), dx, kept)

    def gradients_of_dense(self, G: Tensor) -> tuple[Tensor, ...]:
        return self.S.gradients_of_dense(self.rows.of(G, 0))

    def added_to(self, M: Tensor, *, own: bool = False) -> Tensor:
        M = M if own else M.clone()
        part = self.rows.view(M, 0)
        part += self.S.dense().view(part.shape)
        return M

    def transpose(self) -> FromRows:
        return FromRows(self.S.transpose(), self.rows)

    def rows_scaled(self, d: Tensor) -> IntoRows:
        return IntoRows(self.S.rows_scaled(self.rows.of(d)), self.rows)

    def scaled(self, s: float) -> IntoRows:
        return IntoRows(self.S.scaled(s), self.rows)

    def dense(self) -> Tensor:
        return self.rows.spread(self.S.dense().mT).mT

    def row_dot(self, W: Operator | Tensor) -> Tensor:
        return self.rows.spread(self.S.row_dot(self.rows.of(W if isinstance(W, Tensor) else W.dense(), 0)))

    def squared_row_norms(self) -> Tensor:
        return self.rows.spread(self.S.squared_row_norms())

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        return self.S.cost(tokens, itemsize)

    def cost_of_adding(self, itemsize: int = 4) -> Cost:
        # The other rows are copied, into memory that the system has to zero first.
        out, in_ = self.shape
        return self.S.cost_of_adding(itemsize) + Cost(0, 3 * itemsize * (out - self.rows.count) * in_)

    def cost_of_dx(self, tokens: int, itemsize: int = 4) -> Cost:
        return self.S.cost_of_dx(tokens, itemsize)

    def cost_of_again(self, tokens: int, itemsize: int = 4) -> Cost:
        return self.S.cost_of_again(tokens, itemsize)


@dataclass(eq=False)
class FromRows(Operator):
    """S E: S of some of its input's numbers; the transpose of `IntoRows`.

    Args:
        S: (out × rows.count).
    """

    S: Operator
    rows: Rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.S.shape[0], self.rows.total

    def apply(self, x: Tensor) -> Tensor:
        return self.S.apply(self.rows.of(x))

    def transpose(self) -> IntoRows:
        return IntoRows(self.S.transpose(), self.rows)

    def scaled(self, s: float) -> FromRows:
        return FromRows(self.S.scaled(s), self.rows)

    def dense(self) -> Tensor:
        return self.rows.spread(self.S.dense())

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        return self.S.cost(tokens, itemsize)
