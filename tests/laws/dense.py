"""Every method's weight as plain dense formulas on a matrix and the tensors of a file, written from the papers and the format's description.

Nothing of Veneer is used here. `M` is (out, in), `t` the file's tensors of one layer; `k` is the number of kernel positions (1 for no convolution).
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

Dense = Callable[[Tensor, dict[str, Tensor], "Where"], Tensor]


class Where:
    """What a formula must know of the layer."""

    def __init__(self, out: int, in_: int, kernel: tuple[int, ...] = (), lookup: bool = False) -> None:
        self.out, self.in_, self.kernel, self.lookup = out, in_, kernel, lookup
        self.k = 1
        for n in kernel:
            self.k *= n
        self.channels = in_ // self.k


def lora(s: float) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        A = t["lora_embedding_A"] if where.lookup else t["lora_A.weight"].flatten(1)
        B = t["lora_embedding_B"] if where.lookup else t["lora_B.weight"].flatten(1)
        return M + s * torch.einsum("or,ri->oi", B, A)

    return dense


def dora(s: float) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        V = lora(s)(M, t, where)
        return t["lora_magnitude_vector"].reshape(-1, 1) * V / torch.linalg.vector_norm(V, dim=1, keepdim=True).detach()

    return dense


def from_weight(s: float, r: int, init: str) -> Dense:
    """PiSSA and OLoRA: the change is counted from the first factors, which follow from M alone."""

    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        if init == "olora":
            Q, R = torch.linalg.qr(M.detach())
            first = s * Q[:, :r] @ R[:r]
        else:
            U, S, Vh = torch.linalg.svd(M.detach(), full_matrices=False)
            first = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
        return lora(s)(M, t, where) - first

    return dense


def adalora(alpha: float, init_r: int) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        return M + t["lora_B"] @ torch.diag(t["lora_E"].flatten()) @ t["lora_A"] * (alpha / (init_r + 1e-5))

    return dense


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out × channels × kernel, term by term."""
    total: Tensor | None = None
    for i in range(core.shape[0]):
        for j in range(core.shape[1]):
            term = a[i][:, None, None] * b[j][None, :, None] * core[i, j].reshape(1, 1, -1)
            total = term if total is None else total + term
    assert total is not None
    return total


def loha(s: float) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        if "hada_t1" in t:
            one, two = (tucker(t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]).flatten(1) for i in "12")
        else:
            one, two = (t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in "12")
        return M + s * one * two

    return dense


def lokr(s: float) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        if "lokr_w2" in t:
            w2 = t["lokr_w2"]
            if len(where.kernel) == 1:  # the format's own reshape of a product of a matrix with a cube
                return M + s * torch.kron(w1.unsqueeze(0), w2.contiguous()).reshape(M.shape)
            w2 = w2.reshape(*w2.shape[:2], where.k)
        elif "lokr_t2" in t:
            w2 = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
        else:
            w2 = (t["lokr_w2_a"] @ t["lokr_w2_b"]).unflatten(1, (-1, where.k))
        blocks = [torch.cat([w1[a, c] * w2 for c in range(w1.shape[1])], dim=1) for a in range(w1.shape[0])]
        return M + s * torch.cat(blocks, dim=0).reshape(M.shape)

    return dense


def turn(M: Tensor, R: Tensor, where: Where) -> Tensor:
    return R @ M if where.lookup else M @ R


def upper_to_skew(v: Tensor, b: int) -> Tensor:
    """One strict upper triangle, row by row, to U − Uᵀ."""
    rows = []
    at = 0
    for i in range(b):
        n = b - 1 - i
        rows.append(torch.cat([v.new_zeros(b - n), v[at : at + n]]))
        at += n
    U = torch.stack(rows)
    return U - U.T


def oft(b: int, terms: int | None = None, *, share: bool = False, eps: float | None = None) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        v = t["oft_embedding_R.weight"] if where.lookup else t["oft_R.weight"]
        n = (where.out if where.lookup else where.in_) // b
        eye, blocks = torch.eye(b, dtype=M.dtype), []
        for i in range(n):
            Q = upper_to_skew(v[0 if share else i], b)
            if eps is not None:
                bound = eps / len(v) ** 0.5
                size = torch.linalg.matrix_norm(Q).item()
                Q = Q + (Q * min(1.0, bound / size) - Q).detach()
            if terms is None:
                blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
            else:
                powers = [torch.linalg.matrix_power(Q, j) for j in range(max(terms, 4) if terms > 2 else terms)]
                last = len(powers) - 1
                blocks.append(
                    eye + sum(((1 if terms > 2 and j == last else 2) * powers[j] for j in range(1, last + 1)), torch.zeros_like(eye))
                )
        R = torch.block_diag(*blocks)
        return turn(M, R.T, where)

    return dense


def boft(m: int) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        blocks = t["boft_R"]
        _, n, b, _ = blocks.shape
        D, eye, T = n * b, torch.eye(b, dtype=M.dtype), torch.eye(n * b, dtype=M.dtype)
        for i in range(m):
            order: list[int] = []
            for start in range(0, D, b * 2**i):
                groups = (
                    [list(range(g, g + b // 2)) for g in range(start, start + b * 2**i, b // 2)] if i else [list(range(start, start + b))]
                )
                order += [x for g in groups[0::2] + groups[1::2] for x in g]
            P = torch.zeros(D, D, dtype=M.dtype)
            for row, column in enumerate(order):
                P[row, column] = 1
            S = [(blocks[i, j] - blocks[i, j].T) / 2 for j in range(n)]
            T = P @ torch.block_diag(*[(eye - s) @ torch.linalg.inv(eye + s) for s in S]) @ P.T @ T
        return t["boft_s"].reshape(-1, 1) * turn(M, T.T, where)

    return dense


def ia3(*, on_input: bool = False) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        v = t["ia3_l"].flatten()
        return (M.unflatten(1, (-1, where.k)) * v[None, :, None]).flatten(1) if on_input else M * v[:, None]

    return dense


def vera(key: int, r: int, widest_in: int, widest_out: int) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        generator = torch.Generator().manual_seed(key)
        A, B = torch.empty(r, widest_in), torch.empty(widest_out, r)
        for x in (A, B):
            x.uniform_(-((6 / x.shape[1]) ** 0.5), (6 / x.shape[1]) ** 0.5, generator=generator)
        A, B = A[:, : where.in_], B[: where.out]
        return M + torch.diag(t["vera_lambda_b"]) @ B.to(M) @ torch.diag(t["vera_lambda_d"]) @ A.to(M)

    return dense


def hra(*, orthonormal: bool = False) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        u = t["hra_u"]
        R = torch.eye(len(u), dtype=M.dtype)
        done: list[Tensor] = []
        for i in range(u.shape[1]):
            v = u[:, i]
            for w in done if orthonormal else []:
                v = v - (w @ v) * w
            v = v / v.norm()
            done.append(v)
            R = R @ (torch.eye(len(u), dtype=M.dtype) - 2 * torch.outer(v, v))
        return turn(M, R, where)

    return dense


def fourierft(s: float, seed: int) -> Dense:
    def dense(M: Tensor, t: dict[str, Tensor], where: Where) -> Tensor:
        v = t["fourierft_spectrum"]
        places = torch.randperm(where.out * where.in_, generator=torch.Generator().manual_seed(seed))[: len(v)]
        rows, columns = torch.arange(where.out), torch.arange(where.in_)
        change = torch.zeros(where.out, where.in_, dtype=M.dtype)
        for x, place in zip(v, places.tolist(), strict=True):
            p, q = place // where.in_, place % where.in_
            phase = 2 * torch.pi * (p * rows[:, None].double() / where.out + q * columns[None, :].double() / where.in_)
            change = change + x * torch.cos(phase.to(M.dtype))
        return M + s * change / (where.out * where.in_)

    return dense


def square(dim: int) -> tuple[int, int]:
    m = max(d for d in range(1, isqrt(dim) + 1) if dim % d == 0)
    return m, dim // m
