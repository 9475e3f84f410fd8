"""Products of Householder reflections, in their compact form."""

from __future__ import annotations

import torch
from torch import Tensor

from .low_rank import LowRank
from .products import IdentityPlus


def reflections(U: Tensor) -> IdentityPlus:
    """H_1 H_2 ⋯ H_r with H_i = I − 2 u_i u_iᵀ, for the unit columns u_i of U: I − U T Uᵀ.

    T is upper triangular with T⁻¹ = ½ I + striu(Uᵀ U) (the WY form), so r reflections cost one product with a rank-r map.

    Args:
        U: (…, n, r), unit columns.
    """
    r = U.shape[-1]
    inverse = torch.triu(U.mT @ U, 1) + 0.5 * torch.eye(r, dtype=U.dtype, device=U.device)
    wide = inverse.to(torch.promote_types(U.dtype, torch.float32))
    TUt = torch.linalg.solve_triangular(wide, U.mT.to(wide.dtype), upper=True).to(U.dtype)
    return IdentityPlus(LowRank(-U, TUt))


def orthonormal(U: Tensor) -> Tensor:
    """The columns of U made orthonormal in their order (Gram-Schmidt): (…, n, r)."""
    Q, R = torch.linalg.qr(U.to(torch.promote_types(U.dtype, torch.float32)))
    return (Q * torch.diagonal(R, dim1=-2, dim2=-1).sign().unsqueeze(-2)).to(U.dtype)
