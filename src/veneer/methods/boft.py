"""BOFT: W' = diag(s) W (B_m ⋯ B_1)ᵀ, butterfly factors with orthogonal blocks (arXiv:2311.06243, §4; Cayley as in OFT, s from the file format)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import BiasConfig, check_probability, check_whole, register
from ..errors import ConfigError
from .base import Facts, Form, Method, Noise, Parameter

if TYPE_CHECKING:
    from ..operators import Adapted


@register
@dataclass(kw_only=True)
class BOFTConfig(BiasConfig):
    """Configuration of BOFT; the fields are those of the public format.

    Args:
        boft_block_size: b, the size of each block; 0 where `boft_block_num` is given.
        boft_block_num: the number of blocks in each factor; 0 where `boft_block_size` is given.
        boft_n_butterfly_factor: m, the number of factors; each doubles how far numbers mix.
        boft_dropout: share of one factor's blocks that is replaced by the identity while training.
        fan_in_fan_out: accepted because files hold it; the layer's own kind decides how its weight lies.
        init_weights: True starts at the identity, False at a random rotation and scale.
    """

    PEFT_TYPE: ClassVar[str] = "BOFT"
    BIAS_ONLY: ClassVar[str] = "boft_only"

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("boft_dropout", self.boft_dropout)
        size, num = self.boft_block_size, self.boft_block_num
        if bool(size) == bool(num) or min(size, num) < 0:
            raise ConfigError(f"exactly one of boft_block_size and boft_block_num is not 0, got {size} and {num}")
        check_whole("boft_n_butterfly_factor", self.boft_n_butterfly_factor)

    @classmethod
    def facts(cls) -> Facts:
        return Facts("BOFT", "W' = diag(s)·W·(B_m ⋯ B_1)ᵀ, B_i orthogonal", "2311.06243", "§4", 2023, "m in b + out", learning_rate=6e-3)

    def method(self, path: str) -> Method:
        return Boft(self.boft_block_size, self.boft_block_num, self.boft_n_butterfly_factor, self.init_weights, self.boft_dropout)


@dataclass(frozen=True)
class Boft(Method):
    """BOFT of m factors with blocks of size b (or `num` blocks)."""

    b: int
    num: int
    m: int
    init: bool = True
    dropout: float = 0.0

    @property
    def noise(self) -> Noise:
        return Noise(blocks=self.dropout)

    def why_not(self, form: Form) -> str | None:
        D, wanted = form.features, self.b or self.num
        if D % wanted:
            near = [d for d in range(1, D + 1) if D % d == 0]
            return f"rotates {D} features, which {'blocks of' if self.b else 'a number of blocks of'} {wanted} do not divide; divisors are {', '.join(map(str, near))}"
        n, b = self.blocks(form)
        if self.m > 1 and (b % 2 or n % (1 << (self.m - 1))):
            return f"has {n} blocks of {b}; {self.m} butterfly factors need an even block size and a number of blocks that {1 << (self.m - 1)} divides"
        return None

    @property
    def loose(self) -> frozenset[str]:
        return super().loose | {"b", "num", "m"}

    def blocks(self, form: Form) -> tuple[int, int]:
        """(n, b) with n b = the features that are rotated."""
        return (self.num, form.features // self.num) if self.num else (form.features // self.b, self.b)

    def parameters(self, form: Form) -> list[Parameter]:
        n, b = self.blocks(form)
        stored = (1, form.out) if form.kernel else (form.out, 1)
        return [
            Parameter("boft_R", "boft_R", (self.m, n, b, b), inits.zeros if self.init else inits.normal(0.1), grows=(0,)),
            Parameter("boft_s", "boft_s", (form.out,), inits.ones if self.init else inits.normal(1.0), stored, still=inits.ones),
        ]

    def equation(self, W: Adapted, p: Any) -> Adapted:
        B = op.cayley(p.boft_R)
        W = op.rotate(W, op.Butterfly(B).transpose())
        return op.compose(op.Diagonal(p.boft_s), W)
