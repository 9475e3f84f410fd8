"""Kronecker: a small map of small maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Cost, Operator, pieces
from .dense import Dense
from .low_rank import LowRank
from .truncation import Spectrum


@dataclass(eq=False)
class Kronecker(Operator):
    """S ⊗ T, applied as (S ⊗ T) vec(X) = vec(S X Tᵀ) on x read as a matrix X, so the product is never formed.

    Args:
        S: (a × c).
        T: (b × d); the whole is (a·b × c·d).
    """

    by_pieces: ClassVar[bool] = True

    S: Operator
    T: Operator

    @property
    def shape(self) -> tuple[int, int]:
        (a, c), (b, d) = self.S.shape, self.T.shape
        return a * b, c * d

    def apply(self, x: Tensor) -> Tensor:
        (a, c), (b, d) = self.S.shape, self.T.shape
        X = x.unflatten(-1, (c, d))
        if c * d * b + b * c * a <= c * d * a + a * d * b:
            Y = self.S.apply(self.T.apply(X).mT).mT
        else:
            Y = self.T.apply(self.S.apply(X.mT).mT)
        return Y.reshape(*x.shape[:-1], a * b)

    def for_tokens(self) -> Kronecker:
        return Kronecker(_small(self.S), _small(self.T))

    def low_rank(self) -> LowRank:
        S, T = _factors(self.S), _factors(self.T)
        return LowRank(_kron(S.B, T.B), _kron(S.A, T.A))

    def spectrum(self) -> Spectrum:
        # Of U₁ s₁ V₁ ⊗ U₂ s₂ V₂: (U₁ ⊗ U₂) (s₁ ⊗ s₂) (V₁ ⊗ V₂), put in order.
        S, T = self.S.spectrum(), self.T.spectrum()
        s, order = torch.outer(S.s, T.s).flatten().sort(descending=True, stable=True)

        def vectors(k: int) -> tuple[Tensor, Tensor]:
            (US, VS), (UT, VT) = S.vectors(len(S.s)), T.vectors(len(T.s))
            i, j = order[:k] // len(T.s), order[:k] % len(T.s)
            return (US[:, None, i] * UT[None, :, j]).flatten(0, 1), (VS[i, :, None] * VT[j, None, :]).flatten(1)

        return Spectrum(s, vectors)

    def gradients(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        # Y = S X Tᵀ for each token:  U = Sᵀ dY,  dX = U T,  dT = Σ Uᵀ X,  dS = Σ dY (X Tᵀ)ᵀ.
        if not (isinstance(self.S, Dense) and isinstance(self.T, Dense)):
            return super().gradients(x, dy, dx, kept)
        S, T = self.S.M, self.T.M
        (a, c), (b, d) = S.shape, T.shape
        dS, dT = torch.zeros_like(S), torch.zeros_like(T)
        for rows in pieces(x, dy):
            X = x[rows].view(-1, c, d).transpose(0, 1)  # (c, tokens, d)
            dY = (
                dy[rows].view(-1, a, b).transpose(0, 1).reshape(a, -1)
            )  # (a, tokens b); with tokens inside, each product is a few large ones
            U = (S.mT @ dY).view(c, -1, b)
            if dx is not None:
                dx[rows].view(-1, c, d).add_((U @ T).transpose(0, 1))
            dT += torch.bmm(U.mT, X).sum(0)
            V = torch.bmm(X, T.mT.expand(c, d, b)).view(c, -1)
            dS.addmm_(dY, V.mT)
        return dS, dT

    def added_to(self, M: Tensor, *, own: bool = False) -> Tensor:
        S, T = self.S.dense(), self.T.dense()
        (a, c), (b, d) = S.shape, T.shape
        parts = M.reshape(a, b, c, d)
        return torch.addcmul(parts, S[:, None, :, None], T[None, :, None, :], out=parts if own else None).view(a * b, c * d)

    def cost_of_adding(self, itemsize: int = 4) -> Cost:
        out, in_ = self.shape
        return Cost(2 * out * in_, 2 * itemsize * out * in_)

    def transpose(self) -> Kronecker:
        return Kronecker(self.S.transpose(), self.T.transpose())

    def scaled(self, s: float) -> Kronecker:
        if self.S.shape[0] * self.S.shape[1] <= self.T.shape[0] * self.T.shape[1]:
            return Kronecker(self.S.scaled(s), self.T)
        return Kronecker(self.S, self.T.scaled(s))

    def dense(self) -> Tensor:
        return _kron(self.S.dense(), self.T.dense())

    def columns(self, ids: Tensor) -> Tensor:
        d = self.T.shape[1]
        left, right = self.S.columns(ids // d), self.T.columns(ids % d)
        return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)

    def cost(self, tokens: int, itemsize: int = 4) -> Cost:
        (a, c), (b, d) = self.S.shape, self.T.shape
        first = self.T.cost(tokens * c, itemsize) + self.S.cost(tokens * b, itemsize)
        second = self.S.cost(tokens * d, itemsize) + self.T.cost(tokens * a, itemsize)
        return first if c * d * b + b * c * a <= c * d * a + a * d * b else second

    def cost_of_dx(self, tokens: int, itemsize: int = 4) -> Cost:
        (_, c), (b, d) = self.S.shape, self.T.shape
        return Cost(2 * tokens * c * b * d, itemsize * tokens * c * (b + 3 * d))

    def row_dot(self, W: Operator | Tensor) -> Tensor:
        (a, c), (b, d) = self.S.shape, self.T.shape
        dense = W if isinstance(W, Tensor) else W.dense()
        W4 = dense.unflatten(-1, (c, d)).unflatten(-3, (a, b))
        return torch.einsum("...abcd,...ac,...bd->...ab", W4, self.S.dense(), self.T.dense()).flatten(-2)

    def squared_row_norms(self) -> Tensor:
        S, T = self.S.squared_row_norms(), self.T.squared_row_norms()
        return (S.unsqueeze(-1) * T.unsqueeze(-2)).flatten(-2)


def _small(S: Operator) -> Operator:
    """A factor, multiplied out: it has about the square root of the whole's numbers."""
    return S if isinstance(S, Dense) else Dense(S.dense())


def _kron(S: Tensor, T: Tensor) -> Tensor:
    """S ⊗ T, for each of a batch."""
    whole = torch.einsum("...ac,...bd->...abcd", S, T)
    return whole.flatten(-2).flatten(-3, -2)


def _factors(S: Operator) -> LowRank:
    """S as B A of the lowest rank that its structure shows: its own factors, or itself and an identity."""
    found = S.low_rank()
    if found is not None and found.rank <= min(S.shape):
        return found
    M = S.dense()
    out, in_ = S.shape
    eye = torch.eye(min(out, in_), dtype=M.dtype, device=M.device).expand(*M.shape[:-2], -1, -1)
    return LowRank(eye, M) if out <= in_ else LowRank(M, eye)
