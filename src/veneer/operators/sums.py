"""Sums, and low-rank terms of a sum, which are one low-rank map."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from .base import Cost, Operator
from .low_rank import LowRank, concatenate


@dataclass(eq=False)
class Sum(Operator):
    """S₁ + S₂ + …, all of one shape."""

    terms: tuple[Operator, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    def apply(self, x: Tensor) -> Tensor:
        y = self.terms[0].apply(x)
        for term in self.terms[1:]:
            y = term.add_to(y, x)
        return y

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        for term in self.terms:
            y = term.add_to(y, x)
        return y

    @property
    def by_pieces(self) -> bool:  # type: ignore[override]  # what its terms say
        return all(t.by_pieces for t in self.terms)

    @property
    def keeps(self) -> int:  # type: ignore[override]  # what its terms say
        return sum(t.keeps for t in self.terms)

    def accumulate(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(kept for t in self.terms for kept in t.accumulate(y, x))

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        left = iter(kept)
        own = [tuple(islice(left, t.keeps)) for t in self.terms]
        return tuple(g for t, k in zip(self.terms, own, strict=True) for g in t.gradients(x, dy, dx, k))

    def gradients_of_dense(self, G: Tensor) -> tuple[Tensor, ...]:
        given = [G.clone() for _ in self.terms[1:]]
        return tuple(g for t, own in zip(self.terms, [*given, G], strict=True) for g in t.gradients_of_dense(own))

    def holding(self) -> Sum:
        return Sum(tuple(t.holding() for t in self.terms))

    def added_to(self, M: Tensor, *, own: bool = False) -> Tensor:
        for i, term in enumerate(self.terms):
            M = term.added_to(M, own=own or i > 0)
        return M

    def columns(self, ids: Tensor) -> Tensor:
        return _summed(t.columns(ids) for t in self.terms)

    def low_rank(self) -> LowRank | None:
        found = [t.low_rank() for t in self.terms]
        return None if any(f is None for f in found) else concatenate([f for f in found if f is not None])

    def for_tokens(self) -> Operator:
        found = [t.for_tokens() for t in self.terms]
        low = [t for t in found if isinstance(t, LowRank)]
        if len(low) < 2:
            return Sum(tuple(found))
        rest = [t for t in found if not isinstance(t, LowRank)]
        return Sum((concatenate(low), *rest)) if rest else concatenate(low)

    def transpose(self) -> Operator:
        return Sum(tuple(t.transpose() for t in self.terms))

    def rows_scaled(self, d: Tensor) -> Sum:
        return Sum(tuple(t.rows_scaled(d) for t in self.terms))

    def scaled(self, s: float) -> Operator:
        return Sum(tuple(t.scaled(s) for t in self.terms))

    def dense(self) -> Tensor:
        return _summed(t.dense() for t in self.terms)

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        return sum((t.cost(tokens, itemsize) for t in self.terms), Cost(0, 0))

    def cost_of_adding(self, itemsize: int = 4) -> Cost:
        return sum((t.cost_of_adding(itemsize) for t in self.terms), Cost(0, 0))

    def cost_of_dx(self, tokens: int, itemsize: int = 4) -> Cost:
        return sum((t.cost_of_dx(tokens, itemsize) for t in self.terms), Cost(0, 0))

    def cost_of_again(self, tokens: int, itemsize: int = 4) -> Cost:
        return sum((t.cost_of_again(tokens, itemsize) for t in self.terms), Cost(0, 0))


def _summed(tensors: Iterable[Tensor]) -> Tensor:
    first, *others = tensors
    for other in others:
        first = first + other
    return first
