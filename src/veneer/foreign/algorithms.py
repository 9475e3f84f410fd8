"""What the tensors of such a file mean: W' − W of one layer, by each algorithm.

The scale is in the file: α / r, where no α, or 0, means r. LoKr of two full factors has no rank, and there it is 1 whatever α says. Rotations act on the
output's side here, W' = Rᵀ W, where the public format's act on the input's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..form import Form
from ..operators import BlockDiagonal, Dense, Diagonal, Hadamard, Kronecker, LowRank, Operator, Product

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Algorithm:
    """One way to change a layer.

    Args:
        title: what a person calls it.
        marks: names of tensors of which one is in every layer of this kind.
        parts: all the tensors that such a layer may have.
        change: (tensors, W as (out, in), its form) → W' − W, but for DoRA's lengths.
        rank: (tensors) → r; 1 where there is none.
    """

    title: str
    marks: tuple[str, ...]
    parts: tuple[str, ...]
    change: Callable[[Parts, Tensor, Form], Operator]
    rank: Callable[[Parts], int] = lambda parts: 1


def scale(parts: Parts, r: int) -> float:
    """α / r."""
    alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
    return (alpha or r) / r


def merged_core(parts: Parts) -> dict[str, Tensor]:
    """LoCon without the core of its Tucker form, which is the same map with `lora_mid` multiplied into `lora_down`."""
    own = dict(parts)
    if "lora_mid.weight" in own:
        mid, down = own.pop("lora_mid.weight"), own["lora_down.weight"]
        own["lora_down.weight"] = torch.einsum("mn...,ni->mi...", mid, down.flatten(1))
    return own


def _locon(parts: Parts, W: Tensor, form: Form) -> Operator:
    own = merged_core(parts)
    A, B = own["lora_down.weight"].flatten(1), own["lora_up.weight"].flatten(1)
    return scale(parts, len(A)) * LowRank(B, A)


def _tucker(t: Tensor, a: Tensor, b: Tensor) -> Dense:
    return Dense(torch.einsum("ijk,ip,jq->pqk", t.flatten(2), a, b).flatten(1))


def _loha(parts: Parts, W: Tensor, form: Form) -> Operator:
    factors: list[Operator] = []
    for i in "12":
        a, b = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]
        factors.append(_tucker(parts[f"hada_t{i}"], a, b) if f"hada_t{i}" in parts else LowRank(a, b.flatten(1)))
    return scale(parts, len(parts["hada_w1_b"])) * Hadamard(*factors)


def full_kronecker(parts: Parts) -> bool:
    """Whether both of LoKr's factors are full."""
    return "lokr_w1" in parts and "lokr_w2" in parts


def kronecker_rank(parts: Parts) -> int:
    """The rank of LoKr's factors; of full ones the α that stands there, which is what the rank was called."""
    if "lokr_w2_b" in parts:
        return len(parts["lokr_w2_b"])
    if "lokr_w1_b" in parts:
        return len(parts["lokr_w1_b"])
    return max(1, int(float(parts.get("alpha", torch.tensor(1.0)))))


def _lokr(parts: Parts, W: Tensor, form: Form) -> Operator:
    S: Operator = Dense(parts["lokr_w1"]) if "lokr_w1" in parts else LowRank(parts["lokr_w1_a"], parts["lokr_w1_b"])
    if "lokr_w2" in parts:
        T: Operator = Dense(parts["lokr_w2"].flatten(1))
    elif "lokr_t2" in parts:
        T = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        T = LowRank(parts["lokr_w2_a"], parts["lokr_w2_b"].flatten(1))
    return (1.0 if full_kronecker(parts) else scale(parts, kronecker_rank(parts))) * Kronecker(S, T)


def _rotation(parts: Parts, W: Tensor) -> Tensor:
    """R from U − Uᵀ, which is held within α · out in the Frobenius norm of all blocks together; an α of 0 holds nothing."""
    U = parts["oft_blocks"].to(W.dtype)
    Q = U - U.mT
    bound = float(parts.get("alpha", torch.tensor(0.0))) * len(W)
    norm = float(Q.norm())
    Q = Q * (bound / norm) if 0 < bound < norm else Q
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye - Q, eye + Q, left=False)


def _rescaled(parts: Parts, rotated: Operator, W: Tensor) -> Operator:
    """g (W + Δ) − W."""
    if "rescale" not in parts:
        return rotated
    g = parts["rescale"].flatten().to(W.dtype)
    return Product(Diagonal(g), rotated) + Product(Diagonal(g - 1), Dense(W))


def _oft(parts: Parts, W: Tensor, form: Form) -> Operator:
    R = parts["oft_diag"].to(W.dtype) if "oft_diag" in parts else _rotation(parts, W)
    return _rescaled(parts, Product(BlockDiagonal(R.mT).minus_identity(), Dense(W)), W)


def _boft(parts: Parts, W: Tensor, form: Form) -> Operator:
    M = W
    for i, R in enumerate(_rotation(parts, W)):
        b = R.shape[-1]
        k = (b // 2) << i
        # Within each chunk of 2 k rows, row j of the first half stands beside row j of the second.
        rows = M.reshape(-1, 2, k, M.shape[1]).transpose(1, 2).reshape(-1, b, M.shape[1])
        M = (R @ rows).reshape(-1, k, 2, M.shape[1]).transpose(1, 2).reshape(M.shape)
    return _rescaled(parts, Dense(M - W), W)


def _full(parts: Parts, W: Tensor, form: Form) -> Operator:
    return Dense(parts["diff"].flatten(1))


LOCON = Algorithm(
    "LoRA",
    ("lora_up.weight",),
    ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale"),
    _locon,
    lambda parts: len(parts["lora_down.weight"]),
)
LOHA = Algorithm(
    "LoHa",
    ("hada_w1_a",),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha", "dora_scale"),
    _loha,
    lambda parts: len(parts["hada_w1_b"]),
)
LOKR = Algorithm(
    "LoKr",
    ("lokr_w1", "lokr_w1_a"),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "dora_scale"),
    _lokr,
    kronecker_rank,
)
OFT = Algorithm("OFT", ("oft_blocks", "oft_diag"), ("oft_blocks", "oft_diag", "rescale", "alpha"), _oft)
BOFT = Algorithm("BOFT", ("oft_blocks",), ("oft_blocks", "rescale", "alpha"), _boft)
FULL = Algorithm("full difference", ("diff",), ("diff", "alpha"), _full)
ALGORITHMS = (LOCON, LOHA, LOKR, OFT, BOFT, FULL)
PARTS = sorted({p for a in ALGORITHMS for p in a.parts}, key=len, reverse=True)


def algorithm_of(parts: Parts) -> Algorithm | None:
    """The algorithm whose tensors these are; None where they are no one's."""
    if "oft_blocks" in parts:
        found: Algorithm | None = BOFT if parts["oft_blocks"].dim() == 4 else OFT
    else:
        found = next((a for a in ALGORITHMS if any(m in parts for m in a.marks)), None)
    return found if found is not None and set(parts) <= set(found.parts) else None


def change_of(parts: Parts, algorithm: Algorithm, W: Tensor, form: Form) -> Operator:
    """W' − W, with DoRA's lengths where the layer has them: of the rows, or of the input's channels, as the tensor's shape says."""
    change = algorithm.change(parts, W, form)
    if "dora_scale" not in parts:
        return change
    V = W + change.dense().to(W.dtype)
    m = parts["dora_scale"].to(W.dtype)
    if lengths_of_rows(parts, form):
        return Dense(V * (m.reshape(-1, 1) / V.norm(dim=1, keepdim=True)) - W)
    kernel = form.in_ // form.channels
    channels = V.reshape(form.out, form.channels, kernel)
    return Dense((channels * (m.reshape(1, -1, 1) / channels.norm(dim=(0, 2), keepdim=True))).flatten(1) - W)


def lengths_of_rows(parts: Parts, form: Form) -> bool:
    """Whether DoRA's lengths are those of rows."""
    return len(parts["dora_scale"]) == form.out and parts["dora_scale"].numel() == form.out
