"""Evaluate y = L (W (R x) + Δ x) + b for the active adapters of one layer.

Split: the layer's own forward, then the change accumulated into its output; W is never read. Merged: build W' once and do one product. Both are the same equation, which
the law suite holds them to; a cost model chooses where it may (see `choice`), `strategy` chooses by hand. A plain linear layer with one adapter is one autograd node (see
`fitting`, `node`); every other layer, and every layer under torch.compile, whose own partitioner decides what is kept, is `composed` of autograd's operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .. import autocasting
from ..operators import Adapted, ByRows, traced
from .choice import Choice, Strategy, choose
from .composed import Term, by_rows, composed
from .fitting import Fitted, fitted
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


def strategy_now() -> Strategy:
    """The strategy of the moment."""
    return _strategy


class Module(Protocol):
    """What the engine asks of a module with adapted weights."""

    veneer_kinds: dict[str, Any]
    training: bool

    def equations(self, tensor: str) -> list[tuple[Adapted | ByRows, Noise]]: ...


def equations_now(module: Any, tensor: str, *, disturb: bool = True) -> list[tuple[Adapted | ByRows, Noise]]:
    """The active adapters' equations of one weight, disturbed where training disturbs them; of parts as one equation where there is one."""
    found = []
    for equation, noise in module.equations(tensor):
        if disturb and module.training and noise:
            equation = disturbed(equation, noise, module._parameters[tensor])
        if isinstance(equation, ByRows):
            equation = equation.joined() or equation
        found.append((equation, noise))
    return found


def merged_matrix(module: Module, tensor: str, *, disturb: bool = True) -> Tensor:
    """W' of the active adapters of one weight, as an (out, in) matrix: for several, W + Σ (W'_i − W).

    Args:
        disturb: in training mode, disturb what the methods disturb there.
    """
    total = None
    for equation, _ in equations_now(module, tensor, disturb=disturb):
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
    ((tensor, kind),) = layer.veneer_kinds.items()
    found = equations_now(layer, tensor)
    terms = [(equation, noise.input if layer.training else 0.0) for equation, noise in found]
    if len(terms) == 1:
        whole = _in_one_node(layer, kind, terms[0], x)
        if whole is not None:
            return whole
    if _strategy is Strategy.MERGED and not (layer.training and any(noise for _, noise in found)):
        return kind.forward_with(layer, merged_matrix(layer, tensor), merged_bias(layer, tensor), x)
    equation, p = terms[0]
    if len(terms) == 1 and isinstance(equation, ByRows):
        return by_rows(layer, kind, equation, [_part(layer, kind.part(rows), (e, p), x) for rows, e in equation.parts], x)
    return composed(layer, kind, terms, x)


def _part(layer: Any, kind: Any, term: Term, x: Tensor) -> Tensor:
    y = _in_one_node(layer, kind, term, x)
    return composed(layer, kind, [term], x) if y is None else y


def _in_one_node(layer: Any, kind: Any, term: Term, x: Tensor) -> Tensor | None:
    """The output of one layer, or of a part of it, by one autograd node; None where it takes more."""
    if _strategy is Strategy.COMPOSED or traced() or x.dim() < 2 or not x.numel() or not x.is_floating_point():
        return None
    equation, p = term
    W = kind.plain(layer)
    dtype = None if W is None or not type(x) is type(W.data) is Tensor else _computed_in(x, W)
    f = None if dtype is None else fitted(layer, kind, equation, p, x.shape[:-1].numel(), dtype)
    if f is None or dtype is None:
        return None
    if f.g is not None and f.g.requires_grad and torch.is_grad_enabled():
        # Their gradient is read from the output, which a factor of 0 leaves nothing in, or computed again by the node, if there is one.
        graph = x.requires_grad or any(t.requires_grad for S in (f.R, f.delta) if S is not None for t in S.tensors())
        if not graph or (not f.g.is_meta and bool((f.g == 0).any())):
            return None
    b = equation.bias(kind.bias(layer))
    return linear_in_one_node(x, f.W, b, f.g, f.R, f.delta, choice_for(f), dtype, p, (id(layer), 0))


def choice_for(f: Fitted) -> Choice:
    """What is multiplied with what under the strategy of the moment."""
    return choose(_strategy, f.at, f.g is not None, f.R, f.delta)


def _computed_in(x: Tensor, W: Tensor) -> torch.dtype | None:
    """The type in which the layer itself would multiply; None where it would refuse."""
    if not autocasting.is_on(x.device):
        return x.dtype if x.dtype == W.dtype else None
    return None if torch.float64 in (x.dtype, W.dtype) else torch.get_autocast_dtype(x.device.type)
