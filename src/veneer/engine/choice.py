"""What is multiplied with what: a cost model over the operators' counted FLOPs and bytes.

Applying a small map to T tokens passes over T × d numbers; putting it into the weight first passes over d × d. Which is less depends on the layer, the number of tokens and
the device, and is decided for each forward from shapes alone. W' is put together only where rounding cannot eat a small change of a weight: in float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from ..operators import Cost, Operator


class Strategy(StrEnum):
    """How an equation becomes an output."""

    AUTO = "auto"
    SPLIT = "split"
    MERGED = "merged"


@dataclass(frozen=True)
class Choice:
    """What one evaluation multiplies with what."""

    merged_forward: bool = False
    """y = W' x, instead of W x and the change's own products."""
    merged_backward: bool = False
    """dx = W'ᵀ dy likewise."""
    scales_weight: bool = False
    """The row factors multiply W, instead of the output."""


def flops_per_byte(device: torch.device, dtype: torch.dtype) -> float:
    """How many floating-point operations of a large product take as long as moving one byte; rounded, of today's hardware."""
    if device.type == "cpu":
        return 7.0
    return 12.0 if dtype.itemsize >= 4 else 150.0


def choose(
    strategy: Strategy, tokens: int, shape: tuple[int, int], R: Operator | None, delta: Operator | None, scaled: bool, dropped: bool, dtype: torch.dtype, device: torch.device
) -> Choice:
    """What to multiply with what, for `tokens` rows.

    Args:
        shape: (out, in) of W.
        scaled: whether W's rows have factors.
        dropped: whether the change sees another input than W.
    """
    out, in_ = shape
    exact = dtype in (torch.float32, torch.float64)
    scales_weight = scaled and exact and tokens >= in_
    if strategy is Strategy.SPLIT or dropped or not exact:
        return Choice(scales_weight=scales_weight)
    if strategy is Strategy.MERGED:
        return Choice(True, R is None, scaled)
    size, per_byte = dtype.itemsize, flops_per_byte(device, dtype)

    def seconds(*costs: Cost) -> float:
        return sum(c.flops + per_byte * c.bytes for c in costs)

    rotation = [] if R is None else [(R.cost(tokens, size), R.cost(out, size))]
    change = [] if delta is None else [(delta.cost(tokens, size), delta.cost_of_adding(size))]
    split, merged = (seconds(*(pair[i] for pair in rotation + change)) for i in (0, 1))
    back_split, back_merged = (seconds(*(pair[i] for pair in change)) for i in (0, 1))
    return Choice(merged < split, R is None and back_merged < back_split, scales_weight)
