"""Constrained OFT's projection: after every step the stored values themselves go back inside the bound (arXiv:2306.07280, §3)."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

from ..base import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..oft import OFTConfig


class Projection(Schedule):
    """‖Q‖ ≤ eps / √r for every block."""

    def __init__(self, config: OFTConfig) -> None:
        self.config = config

    def after_step(self, layers: Sequence[Any]) -> None:
        for layer in layers:
            # ‖Q‖² is twice the sum over its upper triangle.
            norm = (2 * layer.oft_R.square().sum(-1, keepdim=True)).sqrt()
            bound = self.config.eps / sqrt(layer.oft_R.shape[-2])
            layer.oft_R.mul_(bound / norm.clamp_min(bound))
