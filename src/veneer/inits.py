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


def kaiming(t: Tensor) -> None:
    """U(−1/√fan_in, 1/√fan_in), PyTorch's own choice for a linear layer (Kaiming uniform with a = √5)."""
    bound = 1 / math.sqrt(t[0].numel())
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


def orthogonal_pair(A: Tensor, B: Tensor) -> None:
    """A (r, in) and B (out, r), both with random full-rank directions, yet B A = 0 to rounding: even and odd rows of one orthogonal r × r matrix.

    With Q orthogonal, A = Q_evenᵀ X and B = Y Q_odd for Gaussian X and Y of r/2 rows and columns, scaled by 1/10 each.
    """
    import torch

    r = A.shape[0]
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    even, odd = Q[0::2], Q[1::2]
    A.copy_(even.mT @ torch.randn(r // 2, A.shape[1]) / 10)
    B.copy_(torch.randn(B.shape[0], r // 2) @ odd / 10)
