"""Dropout masks that cost a seed: the same random bytes in the forward and once more in the backward, eight to a number of 64 bits.

Drawing a uniform number for each number of the input takes longer than a 768 × 768 product over the tokens. Here a byte below 256 p drops its number, and what 256 p has
beyond its whole part is made up by a coin for each row, which lets one byte value more drop; so every number is dropped with probability p exactly. The bytes come from
counting: the numbers 0, 1, 2, … scrambled by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014, doi:10.1145/2660193.2660195), which vectors of numbers go
through together.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

_NOTE = "_veneer_mask"


class Mask:
    """Which numbers of a (rows, n) input stay.

    Args:
        rows, n: the input's shape.
        p: the probability with which a number is dropped.
    """

    def __init__(self, rows: int, n: int, p: float, device: torch.device) -> None:
        self.rows, self.n, self.p, self.device = rows, n, p, device
        self.seed = int(torch.randint(2**62, ()))
        self.readers: set[Hashable] = set()
        self.uses = 0
        self.made: Draw | None = None

    def draw(self) -> Draw:
        """The same one at every call."""
        whole, rest = divmod(256 * self.p, 1)
        words = -(-self.n // 8)
        bits = scrambled(self.seed, self.rows * words + (self.rows if rest else 0), self.device)
        limits: Tensor | int = int(whole)
        if rest:
            # A coin for each row from 53 of its own 64 bits.
            coins = (bits[self.rows * words :] >> 11).bitwise_and_(2**53 - 1).double() * 2**-53
            limits = (coins < rest).to(torch.uint8 if whole < 255 else torch.int16).add_(int(whole)).unsqueeze(-1)
        return Draw(bits[: self.rows * words].view(torch.uint8).view(self.rows, 8 * words)[:, : self.n], limits)

    def again(self) -> Draw:
        """The mask in backward; kept until every layer that used it has asked."""
        self.uses -= 1
        made = self.draw() if self.made is None else self.made
        self.made = made if self.uses > 0 else None
        return made


class Draw:
    """A mask's bytes, (rows, n), and the limits from which on a byte stays."""

    def __init__(self, drawn: Tensor, limits: Tensor | int) -> None:
        self.bytes, self.limits = drawn, limits

    def keep(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """1 where a number of these rows stays, and 0 where it is dropped."""
        drawn = self.bytes[rows]
        limits = self.limits if isinstance(self.limits, int) else self.limits[rows]
        return torch.ge(drawn, limits, out=torch.empty(drawn.shape, dtype=dtype, device=drawn.device))


def scrambled(seed: int, n: int, device: torch.device) -> Tensor:
    """n random 64-bit numbers, the same for the same seed on every device."""
    z = torch.empty(n, dtype=torch.int64, device=device)
    size = WORDS_IN_CACHE if device.type == "cpu" else max(1, n)
    high = torch.empty(min(n, size), dtype=torch.int64, device=device)
    for first in range(0, n, size):
        part = z[first : first + size]
        last = first + len(part)
        torch.arange(first, last, out=part)
        part.mul_(-7046029254386353131).add_(seed)
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
            # Shifts of signed numbers pull copies of the sign in, which would cancel it.
            moved = torch.bitwise_right_shift(part, shift, out=high[: len(part)]).bitwise_and_((1 << (64 - shift)) - 1)
            part.bitwise_xor_(moved)
            if factor != 1:
                part.mul_(factor)
    return z


WORDS_IN_CACHE = 1 << 17


def mask_of(x: Tensor, p: float, reader: Hashable) -> tuple[Mask, Draw]:
    """A mask for an input with features last, and its numbers; different layers that read the same tensor share both.

    Args:
        reader: who asks; one that asks again is in its next forward, and gets a new mask.
    """
    held = getattr(x, _NOTE, None)
    if held is None or held[0].p != p or held[2] != x._version or reader in held[0].readers:
        mask = Mask(x.shape[:-1].numel(), x.shape[-1], p, x.device)
        held = (mask, mask.draw(), x._version)
        setattr(x, _NOTE, held)  # the bytes live as long as this tensor; backward draws them anew
    held[0].readers.add(reader)
    return held[0], held[1]
