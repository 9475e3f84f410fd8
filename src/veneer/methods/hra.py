"""HRA: W' = W H_1 ⋯ H_r, Householder reflections H_i = I − 2 u_i u_iᵀ / ‖u_i‖² (arXiv:2405.17484, §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .. import inits
from .. import operators as op
from ..config import BiasConfig, check_whole, register
from .base import Facts, Form, Method, Parameter

if TYPE_CHECKING:
    from ..operators import Adapted


@register
@dataclass(kw_only=True)
class HRAConfig(BiasConfig):
    """Configuration of HRA; the fields are those of the public format.

    Args:
        r: the number of reflections; an even one starts at no change.
        apply_GS: make the u_i orthonormal in every forward (Gram-Schmidt); then the start is not the identity.
        init_weights: True starts with pairs of equal u_i, False with random ones.
    """

    PEFT_TYPE: ClassVar[str] = "HRA"
    BIAS_ONLY: ClassVar[str] = "hra_only"

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("r", self.r)

    @classmethod
    def facts(cls) -> Facts:
        return Facts("HRA", "W' = W·H₁ ⋯ H_r, H_i = I − 2 u_i u_iᵀ / ‖u_i‖²", "2405.17484", "§3", 2024, "r in", learning_rate=1e-2)

    def method(self, path: str) -> Method:
        return Hra(self.r, self.apply_GS, self.init_weights)


@dataclass(frozen=True)
class Hra(Method):
    """HRA of r reflections, free or orthonormal."""

    r: int
    orthonormal: bool
    init: bool

    def why_not(self, form: Form) -> str | None:
        if self.orthonormal and self.r > form.features:
            return f"has {form.features} features, fewer than the r={self.r} directions that apply_GS makes orthonormal"
        return None

    def parameters(self, form: Form) -> list[Parameter]:
        # Equal pairs cannot be made orthonormal.
        init = inits.pairs if self.init and not self.orthonormal else inits.kaiming
        still = None if self.orthonormal or self.r % 2 else inits.pairs
        return [Parameter("u", "hra_u", (form.features, self.r), init, still=still)]

    def equation(self, W: Adapted, p: Any) -> Adapted:
        U = op.orthonormal(p.u) if self.orthonormal else p.u / p.u.square().sum(-2, keepdim=True).sqrt()
        return op.rotate(W, op.reflections(U))
