"""The form of a layer's weight as a linear map: the shape that an equation is written for, and what the file format tells apart."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Form:
    """An (out × in) map.

    Args:
        out: rows.
        in_: columns; of a convolution, channels of one group × kernel.
        kernel: the kernel's size, empty for a layer that is no convolution.
        lookup: the input is the number of a column (an embedding), so that features lie on the output's side.
        experts: how many independent (out × in) maps lie in one weight, None for one map.

    >>> Form(8, 27, kernel=(3, 3)).channels
    3
    """

    out: int
    in_: int
    kernel: tuple[int, ...] = ()
    lookup: bool = False
    experts: int | None = None

    @property
    def channels(self) -> int:
        """Columns without the kernel."""
        return self.in_ // prod(self.kernel)

    @property
    def features(self) -> int:
        """The side that a rotation turns: the input, or an embedding's output."""
        return self.out if self.lookup else self.in_

    def __str__(self) -> str:
        columns = f"{self.channels} × {'×'.join(map(str, self.kernel))}" if self.kernel else str(self.in_)
        return f"{f'{self.experts} × ' if self.experts is not None else ''}{self.out} × {columns}"
