"""W' whose rows follow several equations: the parts of one fused weight, adapted each by itself.

Where no part rotates its input, this is again one equation on the whole of W, Δ = Σ E_pᵀ Δ_p and L = diag(1 … g_p … 1), and everything that serves equations serves it.
A rotation is of one part's input only, so such parts stay apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ..form import Form
from .adapted import Adapted, FrozenMap
from .base import Operator
from .diagonal import Diagonal
from .rows import IntoRows, Rows


@dataclass(eq=False)
class ByRows:
    """W with some of its rows replaced; the parts do not overlap.

    Args:
        W: the whole.
        parts: which rows, and their equation, whose own W is those rows.
    """

    W: FrozenMap
    parts: tuple[tuple[Rows, Adapted], ...]

    @property
    def form(self) -> Form:
        """Rows and columns of the whole."""
        return self.W.form

    @property
    def additive(self) -> bool:
        """Whether W' = W + Δ."""
        return all(e.additive for _, e in self.parts)

    @property
    def shift(self) -> Tensor | None:
        """What is added to the bias: (out,)."""
        found = [rows.spread(e.shift) for rows, e in self.parts if e.shift is not None]
        return reduce(add, found) if found else None

    def change(self) -> Operator | None:
        """W' − W; None where nothing of W changes."""
        found = [IntoRows(change, rows) for rows, e in self.parts if (change := e.change()) is not None]
        return reduce(add, found) if found else None

    def joined(self) -> Adapted | None:
        """The same as one equation on the whole; None where a part has none."""
        if any(e.R is not None or not (e.L is None or isinstance(e.L, Diagonal)) for _, e in self.parts):
            return None
        if len({e.scales_bias for _, e in self.parts if e.L is not None}) > 1:
            return None
        delta: Operator | None = None
        g: Tensor | None = None
        for rows, e in self.parts:
            if e.delta is not None:
                delta = IntoRows(e.delta, rows) if delta is None else delta + IntoRows(e.delta, rows)
            if isinstance(e.L, Diagonal):
                own = rows.spread(e.L.d - 1)
                g = own if g is None else g + own
        L = None if g is None else Diagonal(1 + g)
        return Adapted(self.W, delta=delta, L=L, scales_bias=any(e.scales_bias for _, e in self.parts), shift=self.shift)

    def dense(self) -> Tensor:
        """W' as an (out, in) tensor."""
        W = self.W.dense()
        parts = [(rows, e.dense()) for rows, e in self.parts]
        W = W.to(reduce(torch.promote_types, (M.dtype for _, M in parts), W.dtype))
        # Out of place, so that autograd follows.
        return W + sum(rows.spread((M - rows.of(W, 0)).mT).mT for rows, M in parts)

    def bias(self, b: Tensor | None) -> Tensor | None:
        """b' from the layer's own bias b."""
        for rows, e in self.parts:
            own = None if b is None else rows.of(b)
            new = e.bias(own)
            if new is not own and new is not None:
                b = rows.spread(new) if b is None or own is None else b + rows.spread(new - own)
        return b
