"""DoRA, a combinator: the direction of any W + Δ, with a trained length for every row.

W' = diag(m / ‖W + Δ‖) (W + Δ), where the norm of each row counts as a constant (arXiv:2402.09353, eq. 5 and §4.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import inits
from .. import operators as op
from .base import Facts, Form, Method, Noise, Parameter, stacked

if TYPE_CHECKING:
    from ..operators import Adapted


@dataclass(frozen=True)
class Dora(Method):
    """The method `inner` with trained row lengths m, which start as the lengths of the rows of W + Δ."""

    inner: Method

    @classmethod
    def facts(cls) -> Facts:
        """What it says about itself."""
        return Facts("DoRA", "W' = diag(m / ‖W + Δ‖)·(W + Δ)", "2402.09353", "eq. 5", 2024, "out more", learning_rate=5e-3)

    @property
    def noise(self) -> Noise:
        return self.inner.noise

    @property
    def scale(self) -> float | None:
        return self.inner.scale

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def weighted(self, weight: float) -> Method:
        return Dora(self.inner.weighted(weight))

    def _lengths(self, form: Form) -> Parameter:
        stored = (1, form.out, *(1 for _ in form.kernel)) if form.kernel else None
        return Parameter("lora_magnitude_vector", "lora_magnitude_vector", (form.out,), inits.ones, stored, still=inits.kept)

    def parameters(self, form: Form) -> list[Parameter]:
        return [*self.inner.parameters(form), self._lengths(form)]

    def of_experts(self, form: Form) -> list[Parameter]:
        assert form.experts is not None
        return [*self.inner.of_experts(form), stacked(self._lengths(form), form.experts)]

    def finish(self, W: Adapted, p: Any) -> None:
        self.inner.finish(W, p)
        p.lora_magnitude_vector.copy_(op.row_norms(self.inner.equation(W, p)))

    def equation(self, W: Adapted, p: Any) -> Adapted:
        V = self.inner.equation(W, p)
        return op.compose(op.Diagonal(p.lora_magnitude_vector / op.row_norms(V)), V)
