"""LoRA: W' = W + s B A with s = α / r, or α / √r when rank-stabilised (arXiv:2106.09685, eq. 3; arXiv:2312.03732, eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import PatternConfig, pattern_value, register
from ..errors import ConfigError, suggest
from .base import Facts, Method, Parameter
from .dora import Dora

if TYPE_CHECKING:
    from ..operators import Adapted

_INITS = (True, False, "gaussian", "orthogonal")
_BIASES = ("none", "all", "lora_only")
_NOT_HERE = "this variant of LoRA is not part of Veneer"


@register
@dataclass(kw_only=True)
class LoraConfig(PatternConfig):
    """Configuration of LoRA and DoRA; the fields are those of the public format.

    Args:
        lora_alpha: α; the change is scaled by α / r.
        lora_dropout: probability of zeroing each number of the adapter's input while training.
        fan_in_fan_out: accepted because files hold it; the layer's own kind decides how its weight lies.
        bias: which biases of the base train: "none", "all" or "lora_only".
        use_rslora: scale by α / √r.
        use_dora: train the length of every row of the weight as well.
        init_lora_weights: True (A uniform, B zero), "gaussian", "orthogonal", or False (both random: not a no-op).
    """

    PEFT_TYPE: ClassVar[str] = "LORA"
    REFUSED: ClassVar[dict[str, str]] = dict.fromkeys(
        ["lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "ensure_weight_tying", "loftq_config", "use_qalora", "megatron_config",
         "eva_config", "corda_config", "lora_ga_config", "velora_config", "kasa_config", "monteclora_config", "use_bdlora", "arrow_config", "alora_invocation_tokens"],
        _NOT_HERE,
    )  # fmt: skip

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias not in _BIASES:
            raise ConfigError(f"bias: {self.bias!r} is not one of {', '.join(_BIASES)}.{suggest(str(self.bias), _BIASES)}")
        if self.init_lora_weights not in _INITS:
            raise ConfigError(f"init_lora_weights: {self.init_lora_weights!r} is not one of {', '.join(map(str, _INITS))}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: a probability from 0 up to (not including) 1, got {self.lora_dropout!r}")
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ConfigError("init_lora_weights='orthogonal' needs an even rank; choose one, or another init")

    @classmethod
    def facts(cls) -> Facts:
        return Facts("LoRA", "W' = W + s·B A", "2106.09685", "3", 2021, learning_rate=5e-3)

    def method(self, path: str) -> Method:
        r = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.lora_alpha)
        lora = Lora(r, alpha / (sqrt(r) if self.use_rslora else r), self.init_lora_weights, self.lora_dropout)
        return Dora(lora) if self.use_dora else lora


@dataclass(frozen=True)
class Lora(Method):
    """LoRA of rank r and scale s."""

    r: int
    s: float
    init: bool | str = True
    dropout: float = 0.0

    def parameters(self, out: int, in_: int) -> list[Parameter]:
        init_A = inits.normal(1 / self.r) if self.init == "gaussian" else inits.kaiming
        init_B = inits.kaiming if self.init is False else inits.zeros
        return [
            Parameter("lora_A", "lora_A.weight", (self.r, in_), init_A),
            Parameter("lora_B", "lora_B.weight", (out, self.r), init_B),
        ]

    def finish(self, W: Adapted, p: Any) -> None:
        if self.init == "orthogonal":
            inits.orthogonal_pair(p.lora_A.data, p.lora_B.data)

    def equation(self, W: Adapted, p: Any) -> Adapted:
        return W + self.s * op.LowRank(p.lora_B, p.lora_A)
