"""VeRA: W' = W + diag(b) B diag(d) A, with one random frozen A and B for all layers (arXiv:2310.11454, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import BiasConfig, check_probability, check_whole, register
from .base import Facts, Form, Method, Noise, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from ..operators import Adapted


@register
@dataclass(kw_only=True)
class VeraConfig(BiasConfig):
    """Configuration of VeRA; the fields are those of the public format.

    Args:
        r: the rank.
        projection_prng_key: the seed of the shared A and B.
        save_projection: write A and B into the file, so that no other release's random numbers matter.
        vera_dropout: probability of zeroing each number of the adapter's input while training.
        d_initial: the first value of d.
        fan_in_fan_out: accepted because files hold it; the layer's own kind decides how its weight lies.
        init_weights: True starts with b = 0, False at a random change.
    """

    PEFT_TYPE: ClassVar[str] = "VERA"
    BIAS_ONLY: ClassVar[str] = "vera_only"

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("vera_dropout", self.vera_dropout)
        check_whole("r", self.r)

    @classmethod
    def facts(cls) -> Facts:
        return Facts("VeRA", "W' = W + diag(b)·B·diag(d)·A, A and B shared", "2310.11454", "eq. 2", 2023, "out + r", learning_rate=2e-2)

    def shared(self, forms: list[Form]) -> dict[str, Tensor]:
        import torch

        generator = torch.Generator().manual_seed(self.projection_prng_key)
        shapes = {"vera_A": (self.r, max(f.in_ for f in forms)), "vera_B": (max(f.out for f in forms), self.r)}
        return {key: torch.empty(n, m).uniform_(-sqrt(6 / m), sqrt(6 / m), generator=generator) for key, (n, m) in shapes.items()}

    @property
    def writes_shared(self) -> bool:
        return self.save_projection

    def method(self, path: str) -> Method:
        return Vera(self.r, self.d_initial if self.init_weights else None, self.vera_dropout)


@dataclass(frozen=True)
class Vera(Method):
    """VeRA of rank r; d starts at `first`, or at random."""

    r: int
    first: float | None
    dropout: float = 0.0

    @property
    def noise(self) -> Noise:
        return Noise(input=self.dropout)

    @property
    def loose(self) -> frozenset[str]:
        return super().loose | {"first"}

    def parameters(self, form: Form) -> list[Parameter]:
        init_b, init_d = (inits.ones, inits.normal(1.0)) if self.first is None else (inits.zeros, inits.constant(self.first))
        return [Parameter("b", "vera_lambda_b", (form.out,), init_b), Parameter("d", "vera_lambda_d", (self.r,), init_d)]

    def equation(self, W: Adapted, p: Any) -> Adapted:
        A, B = p.vera_A[:, : W.form.in_], p.vera_B[: W.form.out]
        return W + op.LowRank(p.b.unsqueeze(-1) * B, p.d.unsqueeze(-1) * A)
