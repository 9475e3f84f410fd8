"""Which equations one node can evaluate, and what goes into it: the one place that the forward and `explain` both ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operators import Adapted, ByRows, Diagonal, Operator
from .choice import Evaluation


@dataclass(eq=False, repr=False)
class Fitted:
    """W' = g ∘ (W R) + Δ in the form that meets tokens, of one number type, and what its costs depend on."""

    W: Tensor
    g: Tensor | None
    R: Operator | None
    delta: Operator | None
    at: Evaluation


def fitted(layer: Any, kind: Any, equation: Adapted | ByRows, p: float, tokens: int, dtype: torch.dtype) -> Fitted | None:
    """The equation for one node; None where it has to be composed of autograd's operations.

    Args:
        kind: of the layer, or of a part of it.
        p: the share of the change's input that is zeroed.
        dtype: the type to compute in.
    """
    W = kind.plain(layer) if kind.called else None
    if W is None or W.requires_grad or isinstance(equation, ByRows):
        return None
    if not (equation.additive if p else equation.L is None or isinstance(equation.L, Diagonal)):
        return None
    g = equation.L.d if isinstance(equation.L, Diagonal) else None
    delta = equation.delta
    if g is not None and delta is not None:
        delta = delta.rows_scaled(g.detach())
    R, delta = (None if S is None else S.for_tokens().to(dtype) for S in (equation.R, delta))
    exact = dtype == W.dtype and dtype.itemsize >= 4
    # By the layer's mode and not by autograd's, so that a checkpoint's forward without gradients is the same to the last bit.
    trains = layer.training and delta is not None
    return Fitted(W, g, R, delta, Evaluation(tokens, tuple(W.shape), W.device, dtype, trains, exact and not p))
