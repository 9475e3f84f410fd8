"""Evaluate y = L (W (R x) + Δ x) + b for the active adapters of one layer.

Split: the layer's own forward, then the change accumulated into its output; W is never read. Merged: build W' once and do one product. Both are the same equation, which
the law suite holds them to; a cost model chooses where it may (see `choice`), `strategy` chooses by hand. A plain linear layer with one adapter is one autograd node (see
`node`); every other layer, and every layer under torch.compile, whose own partitioner decides what is kept, is composed of autograd's operations here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import Adapted, Diagonal, Operator, Product, traced
from .choice import Choice, Evaluation, Strategy, choose
from .masks import mask_of
from .node import linear_in_one_node
from .noise import disturbed

if TYPE_CHECKING:
    from ..methods.base import Noise


# A plain global: torch.compile guards on it, whereas it cannot trace a context variable.
_strategy = Strategy.AUTO


@contextmanager
def strategy(name: Strategy | str) -> Iterator[None]:
    """Choose the strategy of every adapted layer of this process inside the block: "auto", "split", "merged" or "composed".

    "composed" is of autograd's own operations throughout, slower, and what a gradient of a gradient needs.

    >>> with strategy("merged"):
    ...     pass
    """
    global _strategy
    before, _strategy = _strategy, Strategy(name)
    try:
        yield
    finally:
        _strategy = before


class Module(Protocol):
    """What the engine asks of a module with adapted weights."""

    veneer_kinds: dict[str, Any]
    training: bool

    def base_forward(self, x: Tensor) -> Tensor: ...

    def equations(self, tensor: str) -> list[tuple[Adapted, Noise]]: ...


def merged_matrix(module: Module, tensor: str, *, disturb: bool = True) -> Tensor:
    """W' of the active adapters of one weight, as an (out, in) matrix: for several, W + Σ (W'_i − W).

    Args:
        disturb: in training mode, disturb what the methods disturb there.
    """
    total = None
    for equation, noise in module.equations(tensor):
        if disturb and module.training and noise:
            equation = disturbed(equation, noise, equation.W.dense())
        total = equation.dense() if total is None else total + (equation.dense() - equation.W.dense())
    assert total is not None
    return total


def merged_bias(module: Module, tensor: str) -> Tensor | None:
    """b' of the active adapters: for several, b + Σ (b'_i − b)."""
    own = module.veneer_kinds[tensor].bias(module)
    total = own
    for equation, _ in module.equations(tensor):
        new = equation.bias(own)
        if new is not own and new is not None:
            total = new if total is None else total + (new if own is None else new - own)
    return total


def evaluate(layer: Any, x: Tensor) -> Tensor:
    """The output of an adapted layer that is called."""
    (tensor,) = layer.veneer_kinds
    terms = layer.equations(tensor)
    whole = _in_one_node(layer, terms, x)
    if whole is not None:
        return whole
    if _strategy is Strategy.MERGED and not (layer.training and any(noise for _, noise in terms)):
        return layer.veneer_kind.forward_with(layer, merged_matrix(layer, tensor), merged_bias(layer, tensor), x)
    return _split(layer, terms, x)


def _in_one_node(layer: Any, terms: list[tuple[Adapted, Noise]], x: Tensor) -> Tensor | None:
    """The output by one autograd node, where a plain linear layer has one adapter; None elsewhere."""
    W = layer.veneer_kind.plain(layer)
    if _strategy is Strategy.COMPOSED or traced() or W is None or W.requires_grad or len(terms) != 1:
        return None
    if x.dim() < 2 or not x.numel() or not (type(x) is type(W.data) is Tensor and x.is_floating_point()):
        return None
    dtype = _computed_in(x, W)
    equation, noise = terms[0]
    p = noise.input if layer.training else 0.0
    if dtype is None or not (equation.additive if p else equation.L is None or isinstance(equation.L, Diagonal)):
        return None
    if layer.training and noise:
        equation = disturbed(equation, noise, W)
    g, R, delta = meeting_tokens(equation, dtype)
    if g is not None and g.requires_grad and torch.is_grad_enabled():
        # Their gradient is read from the output, which a factor of 0 leaves nothing in, or computed again by the node, if there is one.
        graph = x.requires_grad or any(t.requires_grad for S in (R, delta) if S is not None for t in S.tensors())
        if not graph or (not g.is_meta and bool((g == 0).any())):
            return None
    exact = dtype == W.dtype and dtype.itemsize >= 4
    # By the layer's mode and not by autograd's, so that a checkpoint's forward without gradients is the same to the last bit.
    trains = layer.training and delta is not None
    choice = choice_for(Evaluation(x.shape[:-1].numel(), W.shape, x.device, dtype, trains, exact and not p), g is not None, R, delta)
    return linear_in_one_node(x, W, equation.bias(layer.veneer_kind.bias(layer)), g, R, delta, choice, dtype, p, (id(layer), 0))


def choice_for(at: Evaluation, scaled: bool, R: Operator | None, delta: Operator | None) -> Choice:
    """What is multiplied with what under the strategy of the moment."""
    return choose(_strategy, at, scaled, R, delta)


def meeting_tokens(equation: Adapted, dtype: torch.dtype) -> tuple[Tensor | None, Operator | None, Operator | None]:
    """g, R and Δ of W' = g ∘ (W R) + Δ, with what is small multiplied out, R and Δ in the type of the computation."""
    g = equation.L.d if isinstance(equation.L, Diagonal) else None
    delta = equation.delta
    if g is not None and delta is not None:
        delta = Product(Diagonal(g.detach()), delta)
    R, delta = (None if S is None else S.for_tokens().to(dtype) for S in (equation.R, delta))
    return g, R, delta


def _computed_in(x: Tensor, W: Tensor) -> torch.dtype | None:
    """The type in which the layer itself would multiply; None where it would refuse."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype if x.dtype == W.dtype else None
    return None if torch.float64 in (x.dtype, W.dtype) else torch.get_autocast_dtype(x.device.type)


def _split(layer: Any, terms: list[tuple[Adapted, Noise]], x: Tensor) -> Tensor:
    seen = []
    for i, (equation, noise) in enumerate(terms):
        if layer.training and noise:
            terms[i] = (disturbed(equation, noise, layer._parameters[next(iter(layer.veneer_kinds))]), noise)
        drop = layer.training and noise.input and x.is_floating_point()
        seen.append(_dropped(x, noise.input, (id(layer), i)) if drop else x)
    if len(terms) == 1 and (terms[0][0].additive or seen[0] is x):
        return _adapted(layer, terms[0][0], x, seen[0])
    y = layer.base_forward(x)
    for (equation, _), s in zip(terms, seen, strict=True):
        if equation.additive:
            y = _add(layer, y, equation, s)
            if equation.shift is not None:
                y = y + layer.veneer_kind.spread(layer, equation.shift.to(y.dtype))
        else:
            # What is dropped is the input of the change W' − W, so W meets both the whole input and the dropped one.
            y = y + (_adapted(layer, equation, s, s) - layer.base_forward(s))
    return y


def _dropped(x: Tensor, p: float, reader: Hashable) -> Tensor:
    # The tracer cannot follow a generator of its own; there the partitioner decides what is kept.
    return F.dropout(x, p) if traced() else x * mask_of(x, p, reader)[1].keep(x.dtype).view(x.shape) / (1 - p)


def _adapted(layer: Any, equation: Adapted, x: Tensor, dropped: Tensor) -> Tensor:
    """L (W (R x) + Δ dropped) + b."""
    kind = layer.veneer_kind
    if equation.R is None:
        y = layer.base_forward(x)
    elif kind.rotates_input:
        y = layer.base_forward(kind.apply(layer, equation.R.to(x.dtype), x))
    else:
        y = kind.forward_with(layer, Adapted(equation.W, R=equation.R).dense(), kind.bias(layer), x)
    y = _add(layer, y, equation, dropped)
    if equation.L is not None:
        y = _scale(layer, y, equation.L, equation.scales_bias)
    return y if equation.shift is None else y + kind.spread(layer, equation.shift.to(y.dtype))


def _add(layer: Any, y: Tensor, equation: Adapted, x: Tensor) -> Tensor:
    # y's type is the layer's compute type (autocast's, where that is on), so the small factors are cast and never the activations.
    if equation.delta is not None:
        x = x if x.dtype == y.dtype or not x.is_floating_point() else x.to(y.dtype)
        y = layer.veneer_kind.add(layer, y, equation.delta.to(y.dtype), x)
    return y


def _scale(layer: Any, y: Tensor, L: Operator, scales_bias: bool) -> Tensor:
    """L y, or L (y − b) + b where the bias is not scaled."""
    kind = layer.veneer_kind
    b = None if scales_bias else kind.bias(layer)
    if isinstance(L, Diagonal):
        # L y = y + (L − 1) y: in half precision 1 + ε rounds to 1, but ε itself does not.
        offset = kind.spread(layer, (L.d - 1).to(y.dtype))
        return torch.addcmul(y, y if b is None else y - kind.spread(layer, b.to(y.dtype)), offset)
    L = L.to(y.dtype)
    z = kind.on_output(layer, L, y)
    if b is not None:
        z = z + kind.spread(layer, b.to(y.dtype) - L.apply(b.to(y.dtype)))
    return z.to(y.dtype)
