"""AdaLoRA: W' = W + s P diag(λ) Q, triplets pruned by their importance while training (arXiv:2303.10512, eq. 3; the scale is the file format's)."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .. import inits
from .. import operators as op
from ..config import BiasConfig, check_probability, check_whole, register
from ..errors import ConfigError
from .base import Facts, Form, Method, Noise, Parameter, Schedule

if TYPE_CHECKING:
    from ..operators import Adapted

logger = logging.getLogger("veneer")

TRIPLETS = ("lora_A", "lora_E", "lora_B")
_NOT_ADALORA = "AdaLoRA has no such option; init_r, target_r and lora_alpha are its numbers"


@register
@dataclass(kw_only=True)
class AdaLoraConfig(BiasConfig):
    """Configuration of AdaLoRA; the fields are those of the public format.

    Args:
        init_r: the rank of every layer at the start.
        target_r: the average rank at the end.
        tinit: steps before the first pruning.
        tfinal: steps after the last one.
        deltaT: steps from one pruning to the next.
        beta1: how slowly the importance of a number follows |p · grad|.
        beta2: how slowly its uncertainty does.
        orth_reg_weight: weight of the penalty that keeps P and Q orthogonal.
        total_step: steps of the whole training; taken from Trainer or from the learning-rate scheduler where it is not given.
        rank_pattern: which triplets of each layer were kept, as files of finished runs hold it.
        r: not used; accepted because published recipes give it.
        lora_alpha: α; the change is scaled by α / init_r.
        lora_dropout: probability of zeroing each number of the adapter's input while training.
        fan_in_fan_out: accepted because files hold it; the layer's own kind decides how its weight lies.
        init_lora_weights: True starts at no change, False at a random one.
    """

    PEFT_TYPE: ClassVar[str] = "ADALORA"
    BIAS_ONLY: ClassVar[str] = "lora_only"
    REFUSED: ClassVar[dict[str, str]] = dict.fromkeys(
        ["use_rslora", "use_dora", "alpha_pattern", "lora_bias", "loftq_config"], _NOT_ADALORA
    )

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # the format's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_lora_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("lora_dropout", self.lora_dropout)
        for name in ("init_r", "target_r", "deltaT"):
            check_whole(name, getattr(self, name))
        if self.target_r > self.init_r:
            raise ConfigError(f"target_r={self.target_r} is above init_r={self.init_r}; AdaLoRA prunes from init_r down to target_r")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}: a number between 0 and 1, got {getattr(self, name)!r}")
        if self.orth_reg_weight < 0:
            raise ConfigError(f"orth_reg_weight: not below 0, got {self.orth_reg_weight!r}")
        for path, kept in (self.rank_pattern or {}).items():
            if not isinstance(kept, list) or not all(isinstance(k, bool) for k in kept):
                raise ConfigError(
                    f"rank_pattern[{path!r}]: AdaLoRA finds ranks by itself; files hold a list of true and false there, got {kept!r}"
                )
        if self.r not in (8, self.init_r, self.target_r):
            logger.warning(
                "AdaLoRA does not use r=%s; it starts at init_r=%s and prunes to target_r=%s", self.r, self.init_r, self.target_r
            )
        self._check_steps(self.total_step)

    def _check_steps(self, total: int | None) -> None:
        if total is not None and (total < 1 or self.tinit >= total - self.tfinal):
            raise ConfigError(
                f"total_step={total} leaves no step to prune in: it must be above tinit + tfinal = {self.tinit + self.tfinal}; train longer, or lower these"
            )

    def set_total_steps(self, steps: int) -> None:
        if self.total_step is None:
            self._check_steps(steps)
            self.total_step = steps

    @classmethod
    def facts(cls) -> Facts:
        return Facts("AdaLoRA", "W' = W + s·P·diag(λ)·Q, pruned", "2303.10512", "eq. 3", 2023, "r (out + in + 1)", learning_rate=5e-3)

    def method(self, path: str) -> Method:
        kept = (self.rank_pattern or {}).get(f"{path}.lora_E")
        # The format keeps the scale of the first rank, whatever is pruned.
        s = (self.lora_alpha if self.lora_alpha > 0 else self.r) / (self.init_r + 1e-5)
        return AdaLora(self.init_r if kept is None else sum(kept), s, self.init_lora_weights, self.lora_dropout)

    def with_rank(self, rank: int) -> Self:
        return dataclasses.replace(self, init_r=rank, rank_pattern=None)

    def schedule(self) -> Schedule:
        from .schedules.budget import Budget

        return Budget(self)


@dataclass(frozen=True)
class AdaLora(Method):
    """AdaLoRA of r triplets and scale s."""

    r: int
    s: float
    init: bool = True
    dropout: float = 0.0

    @property
    def noise(self) -> Noise:
        return Noise(input=self.dropout)

    def parameters(self, form: Form) -> list[Parameter]:
        init, r = inits.normal(0.02), self.r
        E = inits.zeros if self.init else init
        shapes = [(r, form.in_), (r, 1), (form.out, r)]
        factors = [
            Parameter(n, n, shape, E if n == "lora_E" else init, grows=(int(n == "lora_B"),), scaled=n == "lora_E")
            for n, shape in zip(TRIPLETS, shapes, strict=True)
        ]
        averages = [
            Parameter(f"{p.name}_{average}", "", p.shape, inits.zeros, trainable=False, state=True, grows=p.grows)
            for p in factors
            for average in ("importance", "uncertainty")
        ]
        pruned = Parameter("pruned", "", (r,), inits.zeros, trainable=False, state=True, dtype="bool", grows=(0,))
        return [*factors, *averages, pruned, Parameter("step", "", (1,), inits.zeros, trainable=False, state=True, dtype="int64")]

    def equation(self, W: Adapted, p: Any) -> Adapted:
        return W + self.s * op.LowRank(p.lora_B, p.lora_E * p.lora_A)
