"""DoRA, a combinator: the direction of any W + Δ, with a trained length for every row.

W' = diag(m / ‖W + Δ‖) (W + Δ), where the norm of each row counts as a constant (arXiv:2402.09353, eq. 5 and §4.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import operators as op
from .base import Method, Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from ..operators import Adapted


@dataclass(frozen=True)
class Dora(Method):
    """The method `inner` with trained row lengths m, which start as the lengths of the rows of W + Δ."""

    inner: Method

    @property
    def dropout(self) -> float:
        return self.inner.dropout

    def parameters(self, out: int, in_: int) -> list[Parameter]:
        return [*self.inner.parameters(out, in_), Parameter("lora_magnitude_vector", "lora_magnitude_vector", (out,), _ones)]

    def finish(self, W: Adapted, p: Any) -> None:
        self.inner.finish(W, p)
        p.lora_magnitude_vector.data.copy_(op.row_norms(self.inner.equation(W, p)))

    def equation(self, W: Adapted, p: Any) -> Adapted:
        V = self.inner.equation(W, p)
        return op.compose(op.Diagonal(p.lora_magnitude_vector / op.row_norms(V)), V)


def _ones(t: Tensor) -> None:
    t.fill_(1.0)
