"""The nearest map of low rank, by singular values (Eckart and Young, 1936), without a dense matrix wherever the structure has a shorter way.

Each operator knows its own singular values (`Operator.spectrum`): those of B A come from QR of both factors and a small middle, those of S ⊗ T are the
products of those of S and of T. What needs the vectors asks for the leading ones only, so a Kronecker product's others are never formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .base import Operator
from .low_rank import LowRank


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values, the largest first, and the singular vectors on demand.

    Args:
        s: (n,).
        vectors: k → the first k left and right ones, (out, k) and (k, in).
    """

    s: Tensor
    vectors: Callable[[int], tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """How many are more than rounding."""
        if not len(self.s):
            return 0
        return int((self.s > len(self.s) * torch.finfo(self.s.dtype).eps * self.s[0]).sum())

    def error(self, k: int) -> float:
        """‖S − S_k‖ / ‖S‖ in the Frobenius norm for the first k of them."""
        squares = self.s.double().square()
        return float((squares[k:].sum() / squares.sum()).sqrt()) if k < self.rank else 0.0

    def needed(self, tolerance: float) -> int:
        """The fewest whose error is within the tolerance."""
        squares = self.s.double().square()
        tails = squares.flip(0).cumsum(0).flip(0)  # of what is left out when 0, 1, 2 … are kept
        return min(self.rank, int((tails > tolerance**2 * squares.sum()).sum()))


def of_dense(M: Tensor) -> Spectrum:
    """The spectrum of a dense matrix."""
    U, s, Vh = torch.linalg.svd(M.to(torch.promote_types(M.dtype, torch.float32)), full_matrices=False)
    return Spectrum(s, lambda k: (U[:, :k], Vh[:k]))


def of_factors(S: LowRank) -> Spectrum:
    """The spectrum of B A, by QR of both and the small matrix between."""
    B, A = _double(S.B), _double(S.A)
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.mT)
    U, s, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    return Spectrum(s, lambda k: (QB @ U[:, :k], Vh[:k] @ QA.mT))


def _double(t: Tensor) -> Tensor:
    # Apple's devices have no float64.
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


def widest(S: Operator) -> torch.dtype:
    """The type that holds the numbers of all its tensors: float32, or wider."""
    return reduce(torch.promote_types, (t.dtype for t in S.tensors()), torch.float32)


@torch.no_grad()
def truncated(S: Operator, rank: int | None = None, tolerance: float | None = None) -> tuple[LowRank, float]:
    """The best approximation of S as B A, in float32 or wider, and its relative error in the Frobenius norm.

    Args:
        S: one map, (out × in).
        rank: the highest rank. Directions that are no more than rounding are left out, so the result may have a lower one, or 0 where S = 0.
        tolerance: take the lowest rank whose error is at most this. With neither of the two, all of S: exactly, where its structure gives factors.

    Returns:
        B A, with each singular value shared between its factors, and ‖S − B A‖ / ‖S‖.

    Raises:
        ValueError: both are given, or one is out of range.

    >>> S, error = truncated(LowRank(torch.eye(3), torch.diag(torch.tensor([3.0, 4.0, 0.0]))), rank=1)
    >>> S.rank, round(error, 6)
    (1, 0.6)
    """
    if rank is not None and tolerance is not None:
        raise ValueError("give a rank or a tolerance, not both: each decides the other")
    if rank is not None and rank < 1:
        raise ValueError(f"rank: at least 1, got {rank}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: a share of ‖S‖ from 0 to less than 1, got {tolerance}")
    dtype = widest(S)
    S = S.to(dtype)
    exact = S.low_rank()
    if exact is not None and tolerance is None and exact.rank <= min(rank or min(S.shape), *S.shape):
        return exact, 0.0
    found = S.spectrum()
    k = found.needed(tolerance) if tolerance is not None else min(rank or found.rank, found.rank)
    U, Vh = found.vectors(k)
    root = found.s[:k].sqrt()
    return LowRank((U * root).to(dtype), (root.unsqueeze(-1) * Vh).to(dtype)), found.error(k)
