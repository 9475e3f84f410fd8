"""What training disturbs in an equation: rows of Δ, the whole of Δ, blocks of a rotation. Written once, for every method that declares it.

The masks multiply; there is no branch on drawn numbers, which torch.compile could not follow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..operators import Adapted, ByRows, Diagonal, Product

if TYPE_CHECKING:
    from ..methods.base import Noise


def disturbed(equation: Adapted | ByRows, noise: Noise, like: torch.Tensor) -> Adapted | ByRows:
    """The equation of one training step; what is done to the input is not done here.

    Args:
        like: a tensor with the device and type of the masks.
    """
    if isinstance(equation, ByRows):
        return replace(equation, parts=tuple((rows, _disturbed(e, noise, like)) for rows, e in equation.parts))
    return _disturbed(equation, noise, like)


def _disturbed(equation: Adapted, noise: Noise, like: torch.Tensor) -> Adapted:
    delta = equation.delta
    if delta is not None and (noise.rows or noise.whole):
        keep = torch.ones((), device=like.device)
        if noise.rows:
            keep = (torch.rand(equation.form.out, device=like.device) >= noise.rows).float()
            if noise.rescale_rows:
                keep = keep / keep.mean().clamp_min(1 / equation.form.out)
        if noise.whole:
            keep = keep * (torch.rand((), device=like.device) >= noise.whole).float()
        delta = Product(Diagonal(keep.expand(equation.form.out)), delta)
    if not noise.blocks:
        return replace(equation, delta=delta)
    R = None if equation.R is None else equation.R.drop_blocks(noise.blocks)
    L = None if equation.L is None else equation.L.drop_blocks(noise.blocks)
    return replace(equation, delta=delta, R=R, L=L)
