"""Orthogonal maps: blocks from skew-symmetric ones by the Cayley transform, and products of Householder reflections.

A skew Q (Qᵀ = −Q) gives an orthogonal (I − Q)(I + Q)⁻¹, which is the identity for Q = 0 and has determinant 1 (arXiv:2306.07280, §3). The series of
the file format approximates its transpose (I + Q)(I − Q)⁻¹ instead, so which of the two made a file decides what the file means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .low_rank import LowRank
from .products import IdentityPlus


def skew(upper: Tensor, b: int) -> Tensor:
    """U − Uᵀ from the strict upper triangles, row by row: (…, b (b − 1) / 2) → (…, b, b)."""
    rows, columns = torch.triu_indices(b, b, 1, device=upper.device)
    U = upper.new_zeros(*upper.shape[:-1], b, b)
    U[..., rows, columns] = upper
    return U - U.mT


def within(Q: Tensor, bound: float) -> Tensor:
    """Each block scaled down to ‖Q‖_F ≤ bound; the scaling is a constant to the gradient, as when the stored values themselves were scaled."""
    norm = Q.detach().square().sum((-2, -1), keepdim=True).sqrt()
    nearest = Q.detach() * (bound / norm.clamp_min(bound))
    return Q + (nearest - Q.detach())


def cayley(Q: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹, block by block: (…, b, b)."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    wide = Q.to(torch.promote_types(Q.dtype, torch.float32))
    return torch.linalg.solve(eye + wide, eye - wide, left=False).to(Q.dtype)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q² + … + Qⁿ⁻¹ with n terms, near (I + Q)(I − Q)⁻¹ where ‖Q‖ < 1; the last power of n ≥ 4 counts once, and 3 means 4."""
    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if terms > 1:
        R = R + 2 * Q
    if terms > 2:
        power = Q @ Q
        R = R + 2 * power
        for _ in range(3, terms - 1):
            power = power @ Q
            R = R + 2 * power
        R = R + power @ Q
    return R


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
