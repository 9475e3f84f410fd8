"""First values of trainable tensors: each function fills the tensor it is given.

They use tensor methods only, so that method files can name them without importing torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def zeros(t: Tensor) -> None:
    """0 everywhere."""
    t.zero_()


def ones(t: Tensor) -> None:
    """1 everywhere."""
    t.fill_(1.0)


def kept(t: Tensor) -> None:
    """What is there already."""


def kaiming(t: Tensor) -> None:
    """U(−1/√fan_in, 1/√fan_in), PyTorch's own choice for a linear layer (Kaiming uniform with a = √5)."""
    bound = 1 / math.sqrt(max(t[0].numel(), 1)) if len(t) else 0.0
    t.uniform_(-bound, bound)


def normal(std: float) -> _Normal:
    """N(0, std²)."""
    return _Normal(std)


class _Normal:
    # A class and not a closure, so that a method which holds it can be pickled.
    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, t: Tensor) -> None:
        t.normal_(0.0, self.std)


def constant(value: float) -> _Constant:
    """One value everywhere."""
    return _Constant(value)


class _Constant:
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, t: Tensor) -> None:
        t.fill_(self.value)


def drawn_places(size: int, seed: int) -> _Places:
    """The first places of 0 … size − 1 in an order that a seed draws."""
    return _Places(size, seed)


class _Places:
    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __call__(self, t: Tensor) -> None:
        import torch

        t.copy_(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed))[: len(t)])


def pairs(t: Tensor) -> None:
    """Random columns (…, n, r), each twice in a row, so that a product of reflections at them is the identity; for an odd r all differ."""
    r = t.shape[-1]
    if r % 2:
        kaiming(t)
        return
    half = t[..., ::2].clone()
    kaiming(half)
    t.copy_(half.repeat_interleave(2, -1))


def principal(W: Tensor, r: int, s: float, iterations: int | None) -> tuple[Tensor, Tensor]:
    """PiSSA: (A, B) with s B A the best rank-r approximation of W, its singular values shared evenly (arXiv:2404.02948, eq. 2 and 3).

    Args:
        W: (…, out, in).
        iterations: of a randomised SVD, seeded so that it gives the same factors each time; None for the exact one.
    """
    import torch

    if iterations is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[..., :r], S[..., :r], Vh[..., :r, :]
    else:
        with torch.random.fork_rng(devices=[W.device] if W.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(W, q=r, niter=iterations)
        Vh = V.mT
    root = (S / s).sqrt()
    return root.unsqueeze(-1) * Vh, U * root.unsqueeze(-2)


def leading_qr(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """OLoRA: (A, B) = the first r rows of R and columns of Q in W = Q R (arXiv:2406.01775, §3)."""
    import torch

    Q, R = torch.linalg.qr(W)
    return R[..., :r, :], Q[..., :r]


def orthogonal_pair(A: Tensor, B: Tensor) -> None:
    """A (r, in) and B (out, r), both with random full-rank directions, yet B A = 0 to rounding: even and odd rows of one orthogonal r × r matrix.

    With Q orthogonal, A = Q_evenᵀ X and B = Y Q_odd for Gaussian X and Y of r/2 rows and columns, scaled by 1/10 each.
    """
    import torch

    r = A.shape[-2]
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    even, odd = Q[0::2], Q[1::2]
    A.copy_(even.mT @ torch.randn(*A.shape[:-2], r // 2, A.shape[-1]) / 10)
    B.copy_(torch.randn(*B.shape[:-1], r // 2) @ odd / 10)
