"""OFT: W' = W Rᵀ with R block diagonal and orthogonal (arXiv:2306.07280, §3; on the input's side, as the file format has it)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import isqrt, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import BiasConfig, check_probability, register
from ..errors import ConfigError
from .base import Facts, Form, Method, Noise, Parameter, Schedule

if TYPE_CHECKING:
    from ..operators import Adapted

logger = logging.getLogger("veneer")


@register
@dataclass(kw_only=True)
class OFTConfig(BiasConfig):
    """Configuration of OFT; the fields are those of the public format.

    Args:
        r: the number of blocks; 0 where `oft_block_size` is given. Where it does not divide the layer's features, the nearest divisor is used.
        oft_block_size: b, the size of each block; 0 where `r` is given.
        module_dropout: share of the blocks that is replaced by the identity while training.
        coft: keep each block's ‖Q‖ within eps / √r.
        eps: the bound of coft.
        block_share: one block, used everywhere.
        use_cayley_neumann: approximate the Cayley transform by a series, which turns the other way.
        num_cayley_neumann_terms: the number of its terms.
        fan_in_fan_out: accepted because files hold it; the layer's own kind decides how its weight lies.
        init_weights: True starts at R = I, False at a random rotation.
    """

    PEFT_TYPE: ClassVar[str] = "OFT"
    BIAS_ONLY: ClassVar[str] = "oft_only"

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("module_dropout", self.module_dropout)
        if bool(self.r) == bool(self.oft_block_size) or min(self.r, self.oft_block_size) < 0:
            raise ConfigError(f"exactly one of r and oft_block_size is not 0, got r={self.r} and oft_block_size={self.oft_block_size}")
        if self.oft_block_size == 1:
            raise ConfigError("oft_block_size=1 leaves nothing to rotate; use at least 2")

    @classmethod
    def facts(cls) -> Facts:
        return Facts("OFT", "W' = W·diag(R₁ … Rₙ)ᵀ, R orthogonal", "2306.07280", "§3", 2023, "in (b − 1) / 2", learning_rate=2e-3)

    def schedule(self) -> Schedule | None:
        from .schedules.projection import Projection

        return Projection(self) if self.coft else None

    def method(self, path: str) -> Method:
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else None
        eps = self.eps if self.coft else None
        return Oft(self.r, self.oft_block_size, terms, eps, self.block_share, self.init_weights, self.module_dropout)


@dataclass(frozen=True)
class Oft(Method):
    """OFT with blocks of size b (or r blocks), by a series of `terms` terms or exactly, within `eps` or free."""

    r: int
    b: int
    terms: int | None
    eps: float | None
    share: bool
    init: bool
    dropout: float = 0.0

    @property
    def noise(self) -> Noise:
        return Noise(blocks=0.0 if self.share else self.dropout)

    @property
    def loose(self) -> frozenset[str]:
        return super().loose | {"b", "share"}

    def blocks(self, form: Form) -> tuple[int, int]:
        """(n, b) with n b = the features that are rotated."""
        found = nearest_divisor(form.features, self.r or self.b)
        return (found, form.features // found) if self.r else (form.features // found, found)

    def parameters(self, form: Form) -> list[Parameter]:
        n, b = self.blocks(form)
        key = "oft_embedding_R.weight" if form.lookup else "oft_R.weight"
        return [Parameter("oft_R", key, (1 if self.share else n, b * (b - 1) // 2), inits.zeros if self.init else inits.normal(0.1))]

    def finish(self, W: Adapted, p: Any) -> None:
        wanted, got = self.r or self.b, self.blocks(W.form)[0 if self.r else 1]
        if wanted != got:
            logger.warning("OFT: %s %d does not divide %d; %d is used", "r" if self.r else "oft_block_size", wanted, W.form.features, got)

    def equation(self, W: Adapted, p: Any) -> Adapted:
        b = (1 + isqrt(1 + 8 * p.oft_R.shape[-1])) // 2
        n = W.form.features // b
        U = p.oft_R if self.eps is None else op.within(p.oft_R, self.eps / sqrt(p.oft_R.shape[-2]))
        R = op.cayley(op.skew(U, b)) if self.terms is None else op.cayley_neumann(U, b, self.terms)
        return op.rotate(W, op.BlockDiagonal(R.expand(*R.shape[:-3], n, b, b)).transpose())


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n nearest to `wanted`, the smaller of two as near.

    >>> nearest_divisor(768, 32), nearest_divisor(10, 4), nearest_divisor(10, 64)
    (32, 5, 10)
    """
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
