"""LoRA: W' = W + s B A with s = α / r, or α / √r when rank-stabilised (arXiv:2106.09685, eq. 3; arXiv:2312.03732, eq. 7).

An init taken from W (PiSSA, OLoRA) starts at B₀ A₀ ≠ 0, so W' = W + s (B A − B₀ A₀): the frozen weight stays what it was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import BiasConfig, PatternConfig, check_choice, check_probability, pattern_value, register
from ..errors import ConfigError
from .base import SILENT, Facts, Form, Method, Noise, Parameter
from .dora import Dora

if TYPE_CHECKING:
    from ..operators import Adapted

_INITS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
_NOT_HERE = "this variant of LoRA is not part of Veneer"


@register
@dataclass(kw_only=True)
class LoraConfig(BiasConfig, PatternConfig):
    """Configuration of LoRA and DoRA; the fields are those of the public format.

    Args:
        lora_alpha: α; the change is scaled by α / r.
        lora_dropout: probability of zeroing each number of the adapter's input while training.
        fan_in_fan_out: accepted because files hold it; the layer's own kind decides how its weight lies.
        use_rslora: scale by α / √r.
        use_dora: train the length of every row of the weight as well.
        lora_bias: train a bias beside B, scaled as B A is.
        init_lora_weights: True (A uniform, B zero), "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_N" (a randomised SVD of N iterations), or
            False (both random: not a no-op).
    """

    PEFT_TYPE: ClassVar[str] = "LORA"
    BIAS_ONLY: ClassVar[str] = "lora_only"
    REFUSED: ClassVar[dict[str, str]] = dict.fromkeys(
        ["trainable_token_indices", "layer_replication", "ensure_weight_tying", "loftq_config", "use_qalora", "megatron_config",
         "eva_config", "corda_config", "lora_ga_config", "velora_config", "kasa_config", "monteclora_config", "use_bdlora", "arrow_config", "alora_invocation_tokens"],
        _NOT_HERE,
    )  # fmt: skip

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"pissa_niter_\d+", str(self.init_lora_weights)):
            check_choice("init_lora_weights", self.init_lora_weights, _INITS)
        check_probability("lora_dropout", self.lora_dropout)
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ConfigError("init_lora_weights='orthogonal' needs an even rank; choose one, or another init")
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias and use_dora exclude each other in the format; leave one of them out")

    @classmethod
    def facts(cls) -> Facts:
        return Facts("LoRA", "W' = W + s·B A", "2106.09685", "eq. 3", 2021, "r (out + in)", learning_rate=5e-3)

    @property
    def combinators(self) -> list[Facts]:
        return [Dora.facts()] if self.use_dora else []

    def method(self, path: str) -> Method:
        r = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.lora_alpha)
        lora = Lora(r, alpha / (sqrt(r) if self.use_rslora else r), self.init_lora_weights, self.lora_dropout, self.lora_bias)
        return Dora(lora) if self.use_dora else lora


@dataclass(frozen=True)
class Lora(Method):
    """LoRA of rank r and scale s."""

    r: int
    s: float
    init: bool | str = True
    dropout: float = 0.0
    with_bias: bool = False

    @property
    def noise(self) -> Noise:
        return Noise(input=self.dropout) if self.dropout else SILENT

    @property
    def shifts(self) -> bool:
        return self.with_bias

    @property
    def loose(self) -> frozenset[str]:
        # B₀ and A₀ follow from the rank, the scale and the init.
        return frozenset({"dropout"}) if self._from_W else super().loose

    @property
    def _from_W(self) -> bool:
        return str(self.init).startswith(("pissa", "olora"))

    def why_not(self, form: Form) -> str | None:
        if self._from_W and self.r > min(form.out, form.in_):
            return (
                f"is {form}, and init_lora_weights={self.init!r} takes r={self.r} directions from it; use a smaller r there (rank_pattern)"
            )
        return None

    def parameters(self, form: Form) -> list[Parameter]:
        init_A = inits.normal(1 / self.r) if self.init == "gaussian" else inits.kaiming
        init_B = inits.kaiming if self.init is False else inits.zeros
        if form.lookup and self.init is True:
            init_A, init_B = inits.zeros, inits.normal(1.0)
        # From W they start at what leaves W alone.
        still = inits.kept if self._from_W else inits.zeros
        key = "lora_embedding_{}" if form.lookup else "lora_{}.weight"
        A = Parameter("lora_A", key.format("A"), (self.r, form.in_), init_A, still=still, grows=(0,))
        B = Parameter("lora_B", key.format("B"), (form.out, self.r), init_B, still=still, grows=(1,), scaled=True)
        if form.kernel:
            ones = (1 for _ in form.kernel)
            A, B = replace(A, stored=(self.r, form.channels, *form.kernel)), replace(B, stored=(form.out, self.r, *ones))
        found = [A, B]
        if self.with_bias:
            found.append(Parameter("lora_b", "lora_B.bias", (form.out,), inits.zeros, scaled=True))
        if self._from_W:
            found += [replace(P, name=P.name + "0", key="", stored=None, init=inits.zeros, trainable=False) for P in (A, B)]
        return found

    def of_experts(self, form: Form) -> list[Parameter]:
        E = form.experts or 0
        A, B, *rest = super().of_experts(form)
        # The format lays experts side by side along the rank: A expert by expert, B rank by rank.
        return [
            replace(A, stored=(E * self.r, form.in_), init=inits.kaiming),
            replace(B, stored=(form.out, self.r * E), order=(1, 2, 0), init=inits.zeros),
            *rest,
        ]

    def finish(self, W: Adapted, p: Any) -> None:
        if self.init == "orthogonal":
            inits.orthogonal_pair(p.lora_A, p.lora_B)
        elif self._from_W:
            M = W.dense().to(p.lora_A0.dtype)
            n = str(self.init).rpartition("_")[2]
            A, B = (
                inits.leading_qr(M, self.r) if self.init == "olora" else inits.principal(M, self.r, self.s, int(n) if n.isdigit() else None)
            )
            for target, value in [(p.lora_A, A), (p.lora_A0, A), (p.lora_B, B), (p.lora_B0, B)]:
                target.copy_(value)

    def equation(self, W: Adapted, p: Any) -> Adapted:
        W = W + self.s * op.LowRank(p.lora_B, p.lora_A)
        if self._from_W:
            W = W + -self.s * op.LowRank(p.lora_B0, p.lora_A0)
        return replace(W, shift=self.s * p.lora_b) if self.with_bias else W
