"""Dropout masks that cost a seed: drawn from it in the forward and once more in the backward, eight numbers to a draw.

Drawing a uniform number for each number of the input takes longer than a 768 × 768 product over the tokens. Here one 64-bit draw gives eight bytes, and a byte below
256 p drops its number. What 256 p has beyond its whole part is made up by a coin for each row, which lets one byte value more drop; so every number is dropped with
probability p exactly.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

_NOTE = "_veneer_mask"


class Mask:
    """Which numbers of a (rows, n) input stay."""

    def __init__(self, rows: int, n: int, p: float, device: torch.device) -> None:
        self.rows, self.n, self.p, self.device = rows, n, p, device
        self.seed = int(torch.randint(2**62, ()))
        self.readers: set[Hashable] = set()
        self.uses = 0
        self.made: Tensor | None = None

    def draw(self) -> Tensor:
        """(rows, n) booleans, each False with probability p; the same ones at every call."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        wide = torch.empty(self.rows, -(-self.n // 8), dtype=torch.int64, device=self.device).random_(-(2**63), None, generator=generator)
        whole, rest = divmod(256 * self.p, 1)
        limit: Tensor | int = int(whole)
        if rest:
            coin = torch.rand(self.rows, 1, device=self.device, generator=generator)
            limit = (coin < rest).to(torch.uint8) + int(whole)
        return wide.view(torch.uint8)[:, : self.n] >= limit

    def again(self) -> Tensor:
        """The mask in backward; kept until every layer that used it has asked."""
        self.uses -= 1
        keep = self.draw() if self.made is None else self.made
        self.made = keep if self.uses > 0 else None
        return keep


def mask_of(x: Tensor, p: float, reader: Hashable) -> tuple[Mask, Tensor]:
    """A mask for an input with features last, and its booleans; different layers that read the same tensor share both.

    Args:
        reader: who asks; one that asks again is in its next forward, and gets a new mask.
    """
    held = getattr(x, _NOTE, None)
    if held is None or held[0].p != p or held[2] != x._version or reader in held[0].readers:
        mask = Mask(x.shape[:-1].numel(), x.shape[-1], p, x.device)
        held = (mask, mask.draw(), x._version)
        setattr(x, _NOTE, held)  # the booleans live as long as this tensor; backward draws them anew
    held[0].readers.add(reader)
    return held[0], held[1]
