"""Combine task vectors, the differences that training made, number by number.

A sum of them adds and takes away what was learnt (task arithmetic, arXiv:2212.04089). Pruning first makes them meet less: it keeps the largest numbers
(TIES, arXiv:2306.01708), or some at random, scaled up so that the expected value stays (DARE, arXiv:2311.03099).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def trimmed(t: Tensor, density: float) -> Tensor:
    """t with the share `density` of its numbers, the largest by magnitude; the others are 0 (TIES, §3, step 1).

    >>> trimmed(torch.tensor([1.0, -3.0, 2.0, 0.5]), 0.5).tolist()
    [0.0, -3.0, 2.0, 0.0]
    """
    if density == 1:
        return t
    kept = t.abs().flatten().topk(int(density * prod(t.shape))).indices
    return torch.zeros_like(t).flatten().scatter(0, kept, t.flatten()[kept]).view(t.shape)


def dropped(t: Tensor, density: float) -> Tensor:
    """t with each number kept with probability `density`, by torch's generator, and divided by it, so that E[t'] = t (DARE: t' = m ∘ t / (1 − p))."""
    return t if density == 1 else t * torch.bernoulli(torch.full_like(t, density)) / density


def agreeing(stacked: Tensor, how: str) -> Tensor:
    """Which numbers have the sign that the majority elects at their place, 0 counted as positive (TIES, §3, step 2).

    Args:
        stacked: (vectors, …).
        how: "total", the sign of Σ τᵢ, or "frequency", that of Σ sgn τᵢ.
    """
    votes = (stacked if how == "total" else stacked.sign()).sum(0)
    return stacked.sign() == torch.where(votes >= 0, 1.0, -1.0).to(stacked)


def merged(vectors: Sequence[Tensor], weights: Sequence[float], how: str, density: float = 1.0, election: str = "total") -> Tensor:
    """One vector from several of one shape.

    Args:
        vectors: τᵢ.
        weights: wᵢ.
        how: "magnitude_prune" and "dare_linear" add the pruned vectors, Σ wᵢ τᵢ; "ties" and "dare_ties" take at each place the mean of those wᵢ τᵢ whose τᵢ agree
            with the elected sign (TIES, §3, step 3).
        density: the share of numbers that pruning keeps.
        election: as in `agreeing`.
    """
    prune = dropped if how.startswith("dare") else trimmed
    stacked = torch.stack([prune(t, density) for t in vectors])
    w = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(-1, *(1 for _ in vectors[0].shape))
    if not how.endswith("ties"):
        return (w * stacked).sum(0)
    mask = agreeing(stacked, election)
    return (w * stacked * mask).sum(0) / mask.sum(0).clamp(min=1)
