"""Orthogonal maps: blocks from skew-symmetric ones by the Cayley transform, and products of Householder reflections.

A skew Q (Qᵀ = −Q) gives an orthogonal (I − Q)(I + Q)⁻¹, which is the identity for Q = 0 and has determinant 1 (arXiv:2306.07280, §3). The series of
the file format approximates its transpose (I + Q)(I − Q)⁻¹ instead, so which of the two made a file decides what the file means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocasting
from .base import product, traced
from .low_rank import LowRank
from .products import IdentityPlus
from .tables import table


def skew(upper: Tensor, b: int) -> Tensor:
    """U − Uᵀ from the strict upper triangles, row by row: (…, b (b − 1) / 2) → (…, b, b)."""
    return _skew(upper, b) if traced() else Skew.apply(upper, b)


def _skew(upper: Tensor, b: int) -> Tensor:
    place, sign, _ = _triangle(b, upper.device)
    return upper.index_select(-1, place).unflatten(-1, (b, b)) * sign.to(upper.dtype)


@table
def _triangle(b: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each place of a (b, b) matrix, which number of the upper triangle stands there (b²,), and with which sign (b, b); and the triangle's places in it."""
    rows, columns = torch.triu_indices(b, b, 1, device=device)
    place = torch.zeros(b, b, dtype=torch.long, device=device)
    place[rows, columns] = torch.arange(len(rows), device=device)
    sign = torch.ones(b, b, device=device).triu(1)
    return (place + place.mT).view(-1), sign - sign.mT, rows * b + columns


class Skew(torch.autograd.Function):
    """U − Uᵀ, whose gradient is read off the upper triangle of G − Gᵀ."""

    @staticmethod
    def forward(ctx: Any, upper: Tensor, b: int) -> Tensor:
        return _skew(upper, b)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        return (G - G.mT).flatten(-2).index_select(-1, _triangle(G.shape[-1], G.device)[2]), None


def within(Q: Tensor, bound: float) -> Tensor:
    """Each block scaled down to ‖Q‖_F ≤ bound; the scaling is a constant to the gradient, as when the stored values themselves were scaled."""
    norm = Q.detach().square().sum((-2, -1), keepdim=True).sqrt()
    nearest = Q.detach() * (bound / norm.clamp_min(bound))
    return Q + (nearest - Q.detach())


def cayley(Q: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹, block by block: (…, b, b)."""
    wide = Q.to(torch.promote_types(Q.dtype, torch.float32))
    return (_cayley(wide) if traced() else Cayley.apply(wide)).to(Q.dtype)


def _cayley(Q: Tensor) -> Tensor:
    eye = _eye(Q)
    return torch.linalg.solve(eye + Q, eye - Q, left=False)


class Cayley(torch.autograd.Function):
    """R = (I − Q)(I + Q)⁻¹. From dR = −½ (I + R) dQ (I + R), the gradient of Q needs R alone, and no second solution."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor) -> Tensor:
        R = _cayley(Q)
        ctx.save_for_backward(R)
        return R

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:
        (R,) = ctx.saved_tensors
        left = (_eye(R) + R).mT
        return -0.5 * (left @ G @ left)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q² + … + Qⁿ⁻¹ with n terms, near (I + Q)(I − Q)⁻¹ where ‖Q‖ < 1; the last power of n ≥ 4 counts once, and 3 means 4."""
    if terms < 3:
        return _eye(Q) + 2 * (terms - 1) * Q
    with autocasting.off(Q.device):
        if not traced():
            return CayleyNeumann.apply(Q, max(terms, 4))
        left, right, *_ = _factors(Q, max(terms, 4))
        return product(left, right)


def _factors(Q: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The two factors of the series, S, and the stages of H: half as many products as terms.

    The series is (I + Q)(I + Q + … + Qⁿ⁻²). With S = Q² and H = I + S + S² + … of ⌊(n−1)/2⌋ terms, that is (I + 2 Q + S) H for odd n, and (I + Q)(I + (Q + S) H) for even n.
    """
    eye = _eye(Q)
    S = product(Q, Q)
    H = [eye]
    for i in range((n - 1) // 2 - 1):
        H.append(eye + S if i == 0 else eye + product(S, H[-1]))
    left = eye + Q if n % 2 == 0 else (eye + S).add(Q, alpha=2)
    right = H[-1] if n % 2 else eye + product(Q + S, H[-1])
    return left, right, S, H


class CayleyNeumann(torch.autograd.Function):
    """The series, of which backward computes the factors again from Q instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(Q)
        ctx.n = n
        left, right, *_ = _factors(Q, n)
        return product(left, right)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        (Q,) = ctx.saved_tensors
        left, right, S, H = _factors(Q, ctx.n)
        dleft, dright = product(G, right.mT), product(left.mT, G)
        if ctx.n % 2:
            dQ, dS, dH = 2 * dleft, dleft, dright
        else:
            dS = product(dright, H[-1].mT)
            dQ, dH = dleft + dS, product((Q + S).mT, dright)
        for before in reversed(H[:-1]):
            dS = dS + (dH if before is H[0] else product(dH, before.mT))
            dH = product(S.mT, dH) if before is not H[0] else dH
        return product(dS, Q.mT).add_(product(Q.mT, dS)).add_(dQ), None


def _eye(like: Tensor) -> Tensor:
    return _identity(like.shape[-1], like.dtype, like.device)[0]


@table
def _identity(b: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    return (torch.eye(b, dtype=dtype, device=device),)


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


def gram_error(M: Tensor) -> float:
    """‖Mᵀ M − I‖ of a matrix, or of the block diagonal matrix of several."""
    wide = M.to(torch.promote_types(M.dtype, torch.float32))
    return float((wide.mT @ wide - torch.eye(M.shape[-1], dtype=wide.dtype, device=M.device)).norm())
