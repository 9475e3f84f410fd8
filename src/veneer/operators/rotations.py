"""Orthogonal maps: blocks from skew-symmetric ones by the Cayley transform, and products of Householder reflections.

A skew Q (Qᵀ = −Q) gives an orthogonal (I − Q)(I + Q)⁻¹, which is the identity for Q = 0 and has determinant 1 (arXiv:2306.07280, §3). The series of
the file format approximates its transpose (I + Q)(I − Q)⁻¹ instead, so which of the two made a file decides what the file means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocasting
from .base import cast, product, traced
from .low_rank import LowRank
from .products import IdentityPlus
from .tables import table


def skew(upper: Tensor, b: int) -> Tensor:
    """U − Uᵀ from the strict upper triangles, row by row: (…, b (b − 1) / 2) → (…, b, b)."""
    return _skew(upper, b) if traced() else Skew.apply(upper, b)


def _skew(upper: Tensor, b: int) -> Tensor:
    place, sign, _ = _triangle(b, upper.device)
    return upper.index_select(-1, place).view(*upper.shape[:-1], b, b).mul_(cast(sign, upper.dtype))


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
        return _upper(G), None


def _upper(G: Tensor) -> Tensor:
    return (G - G.mT).flatten(-2).index_select(-1, _triangle(G.shape[-1], G.device)[2])


def within(upper: Tensor, bound: float) -> Tensor:
    """Each block scaled down to ‖Q‖_F ≤ bound, where ‖Q‖² is twice the sum of squares of its upper triangle; the scaling is a constant to the gradient,
    as when the stored values themselves were scaled."""
    fixed = upper.detach()
    norm = (2 * fixed.square().sum(-1, keepdim=True)).sqrt()
    return upper + (fixed * (bound / norm.clamp_min(bound)) - fixed)


def cayley(M: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹ with Q = (M − Mᵀ) / 2, the skew part of M, block by block: (…, b, b)."""
    wide = M.to(torch.promote_types(M.dtype, torch.float32))
    return (_cayley(wide) if traced() else Cayley.apply(wide)).to(M.dtype)


def _cayley(M: Tensor) -> Tensor:
    eye, twice = _eye(M), M - M.mT
    return torch.linalg.solve(eye.add(twice, alpha=0.5), eye.sub(twice, alpha=0.5), left=False)


class Cayley(torch.autograd.Function):
    """R = (I − Q)(I + Q)⁻¹. From dR = −½ (I + R) dQ (I + R), the gradient of Q needs R alone, and no second solution."""

    @staticmethod
    def forward(ctx: Any, M: Tensor) -> Tensor:
        R = _cayley(M)
        ctx.save_for_backward(R)
        return R

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:
        (R,) = ctx.saved_tensors
        left = (_eye(R) + R).mT
        G = left @ G @ left
        return (G.mT - G) / 4


def cayley_neumann(upper: Tensor, b: int, terms: int) -> Tensor:
    """I + 2 Q + 2 Q² + … + Qⁿ⁻¹ with n terms, near (I + Q)(I − Q)⁻¹ where ‖Q‖ < 1; the last power of n ≥ 4 counts once, and 3 means 4.

    Args:
        upper: (…, b (b − 1) / 2), the strict upper triangles of the skew Q.
    """
    if terms < 3:
        Q = skew(upper, b)
        return _eye(Q) + 2 * (terms - 1) * Q
    with autocasting.off(upper.device):
        if not traced():
            return CayleyNeumann.apply(upper, b, max(terms, 4))
        left, right, *_ = _factors(_skew(upper, b), max(terms, 4))
        return product(left, right)


def _factors(Q: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The two factors of the series, S, and the stages of H: half as many products as terms.

    The series is (I + Q)(I + Q + … + Qⁿ⁻²). With S = Q² and H = I + S + S² + … of ⌊(n−1)/2⌋ terms, that is (I + 2 Q + S) H for odd n, and (I + Q)(I + (Q + S) H) for even n.
    """
    eye = _eye(Q)
    S = product(Q, Q)
    first = eye + S
    H = [eye]
    for i in range((n - 1) // 2 - 1):
        H.append(first if i == 0 else eye + product(S, H[-1]))
    if n % 2:
        return first.add(Q, alpha=2), H[-1], S, H
    return eye + Q, first + Q if n == 4 else eye + product(Q + S, H[-1]), S, H


class CayleyNeumann(torch.autograd.Function):
    """The series, which backward goes through again from the triangle instead of keeping its factors."""

    @staticmethod
    def forward(ctx: Any, upper: Tensor, b: int, n: int) -> Tensor:
        ctx.save_for_backward(upper)
        ctx.b, ctx.n = b, n
        left, right, *_ = _factors(_skew(upper, b), n)
        return product(left, right)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None]:
        (upper,) = ctx.saved_tensors
        Q = _skew(upper, ctx.b)
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
        # S's share of dQ is −(dS Q + Q dS), whose skew part, which alone counts, is that of −(dS + dSᵀ) Q.
        return _upper(dQ - product(dS + dS.mT, Q)), None, None


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
