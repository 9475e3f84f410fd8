"""LoHa: W' = W + s (A₁ B₁) ∘ (A₂ B₂) with s = α / r, a change of rank up to r² (arXiv:2108.06098, Prop. 1 and 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import check_choice, pattern_value, register
from .base import SILENT, Facts, Form, Method, Noise, Parameter
from .lycoris import LycorisConfig, core, has_core, tucker

if TYPE_CHECKING:
    from ..operators import Adapted


@register
@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """Configuration of LoHa; the fields are those of the public format."""

    PEFT_TYPE: ClassVar[str] = "LOHA"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init_weights", self.init_weights, (True, False))

    @classmethod
    def facts(cls) -> Facts:
        return Facts("LoHa", "W' = W + s·(A₁ B₁) ∘ (A₂ B₂)", "2108.06098", "Prop. 1", 2021, "2 r (out + in)", learning_rate=5e-3)

    def method(self, path: str) -> Method:
        r = pattern_value(self.rank_pattern, path, self.r)
        s = pattern_value(self.alpha_pattern, path, self.alpha) / r
        return Loha(r, s, bool(self.init_weights), self.use_effective_conv2d, self.noise(rescale_rows=True))


@dataclass(frozen=True)
class Loha(Method):
    """LoHa of two rank-r factors and scale s."""

    r: int
    s: float
    init: bool = True
    effective: bool = False
    noise: Noise = SILENT

    @property
    def loose(self) -> frozenset[str]:
        return super().loose | {"effective"}

    def parameters(self, form: Form) -> list[Parameter]:
        r, found = self.r, []
        last = inits.zeros if self.init else inits.kaiming
        for i, init_b in [("1", inits.kaiming), ("2", last)]:
            first = i == "1"
            if has_core(form, self.effective):
                found.append(Parameter(f"w{i}_a", f"hada_w{i}_a", (r, form.out), inits.kaiming, grows=(0,), scaled=first))
                found.append(Parameter(f"w{i}_b", f"hada_w{i}_b", (r, form.channels), init_b, grows=(0,)))
                found.append(core(f"t{i}", f"hada_t{i}", r, form))
            else:
                found.append(Parameter(f"w{i}_a", f"hada_w{i}_a", (form.out, r), inits.kaiming, grows=(1,), scaled=first))
                found.append(Parameter(f"w{i}_b", f"hada_w{i}_b", (r, form.in_), init_b, grows=(0,)))
        return found

    def equation(self, W: Adapted, p: Any) -> Adapted:
        if has_core(W.form, self.effective):
            return W + self.s * op.Hadamard(tucker(p.t1, p.w1_a, p.w1_b), tucker(p.t2, p.w2_a, p.w2_b))
        return W + self.s * op.Hadamard(op.LowRank(p.w1_a, p.w1_b), op.LowRank(p.w2_a, p.w2_b))
