"""LoKr: W' = W + s W₁ ⊗ W₂ with s = α / r, each factor full or of rank r (arXiv:2309.14859, §3; the scale is that of the file format)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import check_choice, pattern_value, register
from ..errors import ConfigError
from .base import SILENT, Facts, Form, Method, Noise, Parameter
from .lycoris import LycorisConfig, core, has_core, tucker

if TYPE_CHECKING:
    from ..operators import Adapted, Operator


@register
@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr; the fields are those of the public format.

    Args:
        decompose_both: give W₁ low-rank factors too, where r is below half its size.
        decompose_factor: the size of W₁, or −1 for factors as square as can be.
        rank_dropout_scale: divide the rows that rank_dropout leaves by their share.
        init_weights: True starts with W₁ zero, "lycoris" with W₂ zero, False at a random change.
    """

    PEFT_TYPE: ClassVar[str] = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init_weights", self.init_weights, (True, False, "lycoris"))
        if not isinstance(self.decompose_factor, int) or (self.decompose_factor < 1 and self.decompose_factor != -1):
            raise ConfigError(f"decompose_factor: a whole number of at least 1, or -1, got {self.decompose_factor!r}")

    @classmethod
    def facts(cls) -> Facts:
        count = "a c + r (b + d), out = a b, in = c d"
        return Facts("LoKr", "W' = W + s·W₁ ⊗ W₂", "2309.14859", "§3", 2023, count, learning_rate=1e-2)

    def method(self, path: str) -> Method:
        r = pattern_value(self.rank_pattern, path, self.r)
        s = pattern_value(self.alpha_pattern, path, self.alpha) / r
        noise = self.noise(rescale_rows=self.rank_dropout_scale)
        return Lokr(r, s, self.decompose_both, self.decompose_factor, self.init_weights, self.use_effective_conv2d, noise)


@dataclass(frozen=True)
class Lokr(Method):
    """LoKr of rank r and scale s."""

    r: int
    s: float
    both: bool = False
    factor: int = -1
    init: bool | str = True
    effective: bool = False
    noise: Noise = SILENT

    @property
    def loose(self) -> frozenset[str]:
        return super().loose | {"both", "factor", "effective"}

    def parameters(self, form: Form) -> list[Parameter]:
        (a, b), (c, d), r = split(form.out, self.factor), split(form.channels, self.factor), self.r
        k = form.in_ // form.channels
        first = inits.zeros if self.init is True else inits.kaiming
        second = inits.zeros if self.init == "lycoris" else inits.kaiming
        if self.both and r < max(a, c) / 2:
            found = [
                Parameter("w1_a", "lokr_w1_a", (a, r), first, grows=(1,), scaled=True),
                Parameter("w1_b", "lokr_w1_b", (r, c), inits.kaiming, grows=(0,)),
            ]
        else:
            found = [Parameter("w1", "lokr_w1", (a, c), first, scaled=True)]
        if r >= max(b, d) / 2:
            return [*found, Parameter("w2", "lokr_w2", (b, d * k), second, stored=(b, d, *form.kernel) if form.kernel else None)]
        if has_core(form, self.effective):
            found += [core("t2", "lokr_t2", r, form), Parameter("w2_a", "lokr_w2_a", (r, b), inits.kaiming, grows=(0,))]
            return [*found, Parameter("w2_b", "lokr_w2_b", (r, d), second, grows=(0,))]
        return [
            *found,
            Parameter("w2_a", "lokr_w2_a", (b, r), inits.kaiming, grows=(1,)),
            Parameter("w2_b", "lokr_w2_b", (r, d * k), second, grows=(0,)),
        ]

    def equation(self, W: Adapted, p: Any) -> Adapted:
        W1: Operator = op.Dense(p.w1) if hasattr(p, "w1") else op.LowRank(p.w1_a, p.w1_b)
        if hasattr(p, "w2"):
            if len(W.form.kernel) == 1:  # the format's files hold this one case with the factors in the other order
                k = W.form.in_ // W.form.channels
                return W + self.s * op.Dense(_swapped(W1, p.w2, k))
            W2: Operator = op.Dense(p.w2)
        else:
            W2 = tucker(p.t2, p.w2_a, p.w2_b) if hasattr(p, "t2") else op.LowRank(p.w2_a, p.w2_b)
        return W + self.s * op.Kronecker(W1, W2)


def _swapped(W1: Operator, w2: Any, k: int) -> Any:
    """M[(b, a), (d, c, k)] = W₁[a, c] w₂[b, d, k]."""
    M = op.Kronecker(op.Dense(w2.unflatten(-1, (-1, k)).movedim(-1, 0)), W1).dense()  # (k, out, channels)
    return M.movedim(0, -1).flatten(-2)


def split(dim: int, factor: int) -> tuple[int, int]:
    """(m, n) with m n = dim: m = factor where it divides, otherwise the divisor nearest to √dim from below that is no larger than factor.

    >>> split(768, -1), split(768, 8), split(10, 4)
    ((24, 32), (8, 96), (2, 5))
    """
    if factor > 0 and dim % factor == 0:
        return factor, dim // factor
    top = isqrt(dim) if factor == -1 else min(isqrt(dim), factor)
    m = max(d for d in range(1, top + 1) if dim % d == 0)
    return m, dim // m
