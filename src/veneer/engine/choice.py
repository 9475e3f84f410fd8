"""What is multiplied with what: a cost model over the operators' counted FLOPs and bytes.

Applying a small map to T tokens passes over T × d numbers; putting it into the weight first passes over d × d. Which is less depends on the layer, the number of tokens and
the device, and is decided for each forward from shapes alone. W' is put together only where rounding cannot eat a small change of a weight: in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum

import torch

from ..operators import Cost, Operator


class Strategy(StrEnum):
    """How an equation becomes an output: by the cost model's choice; by the change's own products; by W' put together first; by autograd's own operations."""

    AUTO = "auto"
    SPLIT = "split"
    MERGED = "merged"
    COMPOSED = "composed"


@dataclass(frozen=True)
class Choice:
    """What one evaluation multiplies with what."""

    merged_forward: bool = False
    """y = W' x, instead of W x and the change's own products."""
    merged_backward: bool = False
    """dx = W'ᵀ dy likewise."""
    scales_weight: bool = False
    """The row factors multiply W, instead of the output."""


@dataclass(frozen=True)
class Evaluation:
    """What the costs of one forward and backward depend on besides the operators.

    Args:
        tokens: rows of x.
        shape: (out, in) of W.
        trains: whether Δ's own gradients follow.
        may_merge: whether W' may stand for its parts: not where it would be rounded to half precision, nor where the change sees another input than W.
    """

    tokens: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    trains: bool
    may_merge: bool

    def work(self, cost: Cost) -> float:
        """FLOPs and bytes in one number: the FLOPs of a large product that would take as long."""
        return cost.flops + flops_per_byte(self.device, self.dtype) * cost.bytes


def flops_per_byte(device: torch.device, dtype: torch.dtype) -> float:
    """How many floating-point operations of a large product take as long as moving one byte; rounded, of today's hardware."""
    if device.type == "cpu":
        return 7.0
    return 12.0 if dtype.itemsize >= 4 else 150.0


def costs(at: Evaluation, scaled: bool, R: Operator | None, delta: Operator | None) -> dict[str, float]:
    """The work beyond the frozen layer's own, split and merged, of the forward and of the gradient of x."""
    (out, in_), size = at.shape, at.dtype.itemsize
    change = (0.0, 0.0) if delta is None else (at.work(delta.cost(at.tokens, size)), at.work(delta.cost_of_adding(size)))
    rotation = (0.0, 0.0) if R is None else (at.work(R.cost(at.tokens, size)), at.work(R.cost(out, size)))
    of_dx = 0.0 if delta is None else at.work(delta.cost_of_dx(at.tokens, size))
    again = at.work(delta.cost_of_again(at.tokens, size)) if delta is not None and at.trains else 0.0
    scaling = at.work(Cost(out * in_, 2 * size * out * in_)) if scaled else 0.0
    of_output = at.work(Cost(at.tokens * out, 2 * size * at.tokens * out)) if scaled else 0.0
    return {
        "forward, split": rotation[0] + change[0] + min(scaling, of_output),
        "forward, merged": rotation[1] + change[1] + scaling + again,
        "backward, split": of_dx + min(scaling, of_output),
        "backward, merged": change[1] + scaling,
    }


def choose(strategy: Strategy, at: Evaluation, scaled: bool, R: Operator | None, delta: Operator | None) -> Choice:
    """What to multiply with what.

    Args:
        scaled: whether W's rows have factors.
    """
    key = strategy, at, scaled, R and R.signature(), delta and delta.signature()
    found = _chosen.get(key)
    if found is None:
        if len(_chosen) >= MOST_CHOSEN:
            _chosen.clear()
        found = _chosen[key] = _choose(strategy, at, scaled, R, delta)
    return found


MOST_CHOSEN = 1024
"""Choices that are remembered; counting takes as long as a small product, and shapes come again in every step."""

_chosen: dict[Hashable, Choice] = {}


def _choose(strategy: Strategy, at: Evaluation, scaled: bool, R: Operator | None, delta: Operator | None) -> Choice:
    scales_weight = scaled and at.may_merge and at.tokens >= at.shape[1]
    if strategy is Strategy.SPLIT or not at.may_merge:
        return Choice(scales_weight=scales_weight)
    if strategy is Strategy.MERGED:
        return Choice(True, R is None, scaled)
    work = costs(at, scaled, R, delta)
    return Choice(
        work["forward, merged"] < work["forward, split"], R is None and work["backward, merged"] < work["backward, split"], scales_weight
    )
