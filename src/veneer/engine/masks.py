"""Dropout masks that cost a seed: the same random bytes in the forward and once more in the backward, by one addition of bytes.

Drawing a uniform number for each number of the input takes longer than a 768 × 768 product over the tokens. Here a mask's bytes are sums, modulo 256, of two stretches of two
fixed tables, and a draw is the two places where they start. Each table is a shuffle in which every byte is equally frequent, so from a random place on every single sum is
uniform, exactly, and any two are independent but for four parts in a million. A byte below 256 p drops its number, and what 256 p has beyond its whole part is made up by a coin
for each row, which lets one byte value more drop; so every number is dropped with probability p exactly. The tables come from counting: the numbers 0, 1, 2, … scrambled by the
finaliser of SplitMix64 (Steele, Lea and Flood, 2014, doi:10.1145/2660193.2660195) are the keys by which they were shuffled, the same on every device.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from functools import cache
from weakref import ref as weakref

import torch
from torch import Tensor

from ..operators import NUMBERS_IN_CACHE

LENGTH = 1 << 18
"""Of a table: both lie in a processor's second cache."""

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
        """The same one at every call, made anew."""
        whole, rest = divmod(256 * self.p, 1)
        limits: Tensor | int = int(whole)
        if rest:
            coins = torch.rand(self.rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))
            limits = (coins < rest).to(torch.uint8 if whole < 255 else torch.int16).add_(int(whole)).to(self.device)
        return Draw(self._bytes().view(self.rows, self.n), limits)

    def _bytes(self) -> Tensor:
        first, second = tables(self.device)
        drawn = torch.empty(self.rows * self.n, dtype=torch.uint8, device=self.device)
        starts = random.Random(self.seed)
        for start in range(0, len(drawn), LENGTH):
            part = drawn[start : start + LENGTH]
            i, j = starts.randrange(LENGTH), starts.randrange(LENGTH)
            torch.add(first[i : i + len(part)], second[j : j + len(part)], out=part)
        return drawn

    def again(self) -> Draw:
        """The mask in backward; kept until every layer that used it has asked."""
        self.uses -= 1
        made = self.draw() if self.made is None else self.made
        made.holds = self.made is not None or self.uses > 0
        self.made = made if self.uses > 0 else None
        return made


class Draw:
    """A mask's bytes, (rows, n), and the limits from which on a byte stays."""

    def __init__(self, drawn: Tensor, limits: Tensor | int) -> None:
        self.bytes, self.limits = drawn, limits
        self.holds = drawn.numel() <= NUMBERS_IN_CACHE
        """Whether others may want the same numbers soon, so that what is made is kept for them."""
        self._kept: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._dropped: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def of(self, x: Tensor, rows: slice, mask: Tensor | None = None) -> Tensor:
        """These rows of the masked input, which are `x`, with what is dropped at 0; it stays as it is.

        Args:
            mask: `keep` of these rows, if it is at hand; it stays as it is.
        """
        key = rows.start or 0, len(x), x.dtype
        found = self._dropped.get(key)
        if found is None:
            found = self._made(x.dtype, rows).mul_(x) if mask is None else x * mask
            if self.holds:
                self._dropped[key] = found
        return found

    def keep(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """1 where a number of these rows stays, and 0 where it is dropped; it stays as it is."""
        key = rows.start or 0, len(self.bytes[rows]), dtype
        found = self._kept.get(key)
        if found is None:
            found = self._made(dtype, rows)
            if self.holds:
                self._kept[key] = found
        return found

    def _made(self, dtype: torch.dtype, rows: slice) -> Tensor:
        drawn = self.bytes[rows]
        limits = self.limits if isinstance(self.limits, int) else self.limits[rows]
        return torch.ge(drawn, limits, out=torch.empty(drawn.shape, dtype=dtype, device=drawn.device))


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two shuffles of LENGTH bytes, each value as frequent as the others, twice in a row, so that a stretch may begin anywhere."""
    shuffles = [scrambled(seed, LENGTH, device).argsort().bitwise_and_(255).to(torch.uint8) for seed in (1, 2)]
    return shuffles[0].repeat(2), shuffles[1].repeat(2)


def scrambled(seed: int, n: int, device: torch.device) -> Tensor:
    """n random 64-bit numbers, all different, the same for the same seed on every device."""
    z = torch.arange(n, device=device).mul_(-7046029254386353131).add_(seed)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        # Shifts of signed numbers pull copies of the sign in, which would cancel it.
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return z


def mask_of(x: Tensor, p: float, reader: Hashable) -> tuple[Mask, Draw]:
    """A mask for an input with features last, and its numbers; different layers that read the same tensor share both.

    Args:
        reader: who asks; one that asks again is in its next forward, and gets a new mask.
    """
    if x.is_inference():  # an edit would be seen by nobody, and there is no backward to draw again for
        alone = Mask(x.shape[:-1].numel(), x.shape[-1], p, x.device)
        return alone, alone.draw()
    mask, version = getattr(x, _NOTE, (None, -1))
    if mask is None or mask.p != p or version != x._version or reader in mask.readers:
        mask = Mask(x.shape[:-1].numel(), x.shape[-1], p, x.device)
        setattr(x, _NOTE, (mask, x._version))
    mask.readers.add(reader)
    return mask, _latest.draw(mask, x)


class Latest:
    """The numbers of the mask that was asked for last: the next reader of one input most often comes at once, and an input may live until backward."""

    def __init__(self) -> None:
        self._held: tuple[weakref[Tensor], Mask, Draw] | None = None

    def draw(self, mask: Mask, x: Tensor) -> Draw:
        """The mask's numbers, held until another mask is asked for, or x is gone."""
        held = self._held
        if held is not None and held[1] is mask:
            return held[2]
        drawn = mask.draw()
        self._held = weakref(x, self._forget), mask, drawn
        return drawn

    def _forget(self, gone: weakref[Tensor]) -> None:
        if self._held is not None and self._held[0] is gone:
            self._held = None


_latest = Latest()
