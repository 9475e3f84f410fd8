"""(IA)³: W' = diag(l) W, or W diag(l) in feed-forward layers; the bias is scaled with the output (arXiv:2205.05638, §3.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import PeftConfig, matches, register
from ..errors import ConfigError
from .base import Facts, Form, Method, Parameter

if TYPE_CHECKING:
    from ..operators import Adapted


@register
@dataclass(kw_only=True)
class IA3Config(PeftConfig):
    """Configuration of (IA)³; the fields are those of the public format.

    Args:
        feedforward_modules: those of the targets whose input is scaled, instead of their output.
        fan_in_fan_out: accepted because files hold it; the layer's own kind decides how its weight lies.
        init_ia3_weights: True starts at l = 1, False at random numbers.
    """

    PEFT_TYPE: ClassVar[str] = "IA3"
    NAMING: ClassVar[tuple[str, ...]] = ("feedforward_modules",)

    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, (set, frozenset, tuple)):
            self.feedforward_modules = sorted(self.feedforward_modules)
        if isinstance(self.feedforward_modules, list) and isinstance(self.target_modules, list):
            strange = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if strange:
                raise ConfigError(f"feedforward_modules: {strange[0]!r} is not among target_modules; add it there, or leave it out here")

    @classmethod
    def facts(cls) -> Facts:
        return Facts("(IA)³", "W' = diag(l)·W, or W·diag(l)", "2205.05638", "§3.3", 2022, "out, or in", learning_rate=2e-2)

    def method(self, path: str) -> Method:
        return Ia3(matches(self.feedforward_modules, path), self.init_ia3_weights)


@dataclass(frozen=True)
class Ia3(Method):
    """(IA)³ on the input or on the output of a layer."""

    on_input: bool
    init: bool = True

    def parameters(self, form: Form) -> list[Parameter]:
        n = form.channels if self.on_input else form.out
        stored = (1, n, *(1 for _ in form.kernel)) if form.kernel or self.on_input else (n, 1)
        return [Parameter("l", "ia3_l", (n,), inits.ones if self.init else inits.normal(1.0), stored, still=inits.ones)]

    def equation(self, W: Adapted, p: Any) -> Adapted:
        if self.on_input:
            return op.compose(W, op.Diagonal(p.l.repeat_interleave(W.form.in_ // W.form.channels, -1)))
        return replace(op.compose(op.Diagonal(p.l), W), scales_bias=True)
