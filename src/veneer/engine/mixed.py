"""One layer for a batch in which each sample has its own adapter.

Adapters of equal method and equal shapes are *experts that share one W*: their stored tensors are stacked, the equation is evaluated once on the stack, and the operators, which
have a leading dimension, meet each its own samples. W itself multiplies the whole batch once. Where the stack's numbers would have to be copied for each sample and samples weigh
less, the samples are put in the order of the adapters instead; where W' of each adapter costs less than its change's own products, it is built. What has no such form
(convolutions, embeddings, what training disturbs at random) is evaluated adapter by adapter on its own samples, in the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import autocasting
from ..operators import Adapted, ByRows, Diagonal, Operator, pieces
from .assignment import BASE, Assignment, Pick, pairs, put_together
from .choice import Evaluation, Strategy
from .composed import dropped
from .evaluate import evaluate, strategy_now


@dataclass(frozen=True)
class Share:
    """Some samples of a batch, and the equation that they go through.

    Args:
        samples: in the order in which the equation's stack meets them.
        equation: of one adapter, or of a stack of them.
        stacked: how many lie in the stack, each for as many samples; None for one without a leading dimension.
        p: the share of the change's input that is zeroed.
    """

    samples: list[int]
    equation: Adapted
    stacked: int | None
    p: float

    def seen(self, t: Tensor) -> Tensor:
        """(samples, rows, n) as the stack meets it."""
        return t if self.stacked is None else t.reshape(self.stacked, -1, t.shape[-1])

    def spread(self, v: Tensor) -> Tensor:
        """A vector over features, of each of the stack, so that it meets `seen` elementwise."""
        return v if v.dim() == 1 else v.unsqueeze(-2)

    def apply(self, S: Operator, x: Tensor) -> Tensor:
        """S of the samples' rows."""
        X = self.seen(x)
        if torch.is_grad_enabled():
            return S.apply(X).reshape(*x.shape[:-1], -1)
        y = x.new_empty(*X.shape[:-1], S.shape[0])
        for some in pieces(X, y):
            y[some] = self._of(S, some).apply(X[some])
        return y.view(*x.shape[:-1], -1)

    def add_to(self, y: Tensor, S: Operator, x: Tensor) -> Tensor:
        """y with S of the samples' rows added; y may be overwritten."""
        X, Y = self.seen(x), self.seen(y)
        if torch.is_grad_enabled():
            return S.add_to(Y, X).reshape(y.shape)
        for some in pieces(X, Y):
            own = Y[some]
            added = self._of(S, some).add_to(own, X[some])
            if added.data_ptr() != own.data_ptr():
                own.copy_(added)
        return Y.reshape(y.shape)

    def _of(self, S: Operator, some: slice) -> Operator:
        """The operators of a part of the stack."""
        return S if self.stacked is None else S.map(lambda t: t[some])


def evaluate_mixed(layer: Any, x: Tensor, batch: Assignment, where: Callable[[], str]) -> Tensor:
    """The output of an adapted layer that is called."""
    ((tensor, kind),) = layer.veneer_kinds.items()
    held: dict[str, Any] = {}
    groups = batch.groups(lambda name: held.setdefault(name, layer.at(name)))
    if len(groups) == 1:
        return alone(layer, x, batch, next(iter(groups)), list(range(len(batch))))
    leading = kind.leading(layer, x)
    each = batch.rows_each(x.shape, leading, where)
    shares = None
    if kind.features_last and x.numel() and strategy_now() is not Strategy.COMPOSED:
        rows = each * prod(x.shape[1:-1])
        shares = shared_out(layer, tensor, groups, held, rows)
    if shares is None:
        return put_together(list(pairs(groups, lambda name, own: alone(layer, batch.pick(own).of(x), batch, name, own))))
    X = x.reshape(len(batch), -1, x.shape[-1])
    y = _together(layer, kind, shares, groups.get(BASE, []), X, batch)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def alone(layer: Any, x: Tensor, batch: Assignment, name: str, samples: list[int]) -> Tensor:
    """The ordinary output for samples that all go through one adapter."""
    if name == BASE:
        return layer.base_forward(x)
    with layer.veneer_record.batches.running(batch.part(name, samples)):
        return evaluate(layer, x)


def shared_out(layer: Any, tensor: str, groups: dict[str, list[int]], held: dict[str, Any], rows: int) -> list[Share] | None:
    """The adapters' samples by equations that can be evaluated together; None where some cannot.

    Args:
        held: what each adapter has at the layer, by slot.
        rows: of x, for each sample.
    """
    alike: dict[Hashable, list[str]] = {}
    for name in groups:
        if name != BASE:
            alike.setdefault(likeness(held[name]), []).append(name)
    shares: list[Share] = []
    for names in alike.values():
        noise = next(iter(held[names[0]].values())).method.noise if layer.training else None
        equation = layer.equation_of_all([held[n] for n in names], tensor)
        if isinstance(equation, ByRows):
            equation = equation.joined()
        if equation is None or not (equation.L is None or isinstance(equation.L, Diagonal)):
            return None
        if noise and (noise.rows or noise.whole or noise.blocks or not equation.additive):
            return None
        R, delta = (None if S is None else S.for_tokens() for S in (equation.R, equation.delta))
        p = noise.input if noise else 0.0
        shares += arranged(replace(equation, R=R, delta=delta), [groups[n] for n in names], rows, p)
    return shares


def likeness(held: Mapping[str, Any]) -> Hashable:
    """Equal for adapters of one layer whose equations can be evaluated as one stack."""
    return tuple((slot, a.method, id(a.shared), tuple((s.name, s.shape) for s in a.specs)) for slot, a in held.items())


def arranged(equation: Adapted, samples: list[list[int]], rows: int, p: float) -> list[Share]:
    """A stack's samples in the order that moves the fewest numbers.

    Args:
        samples: of each adapter.
    """
    flat = [i for own in samples for i in own]
    even = len({len(own) for own in samples}) == 1
    if len(samples) == 1:
        return [Share(flat, equation, None, p)]
    if even and flat == sorted(flat):
        return [Share(flat, equation, len(samples), p)]
    numbers = sum(t.numel() for S in (equation.R, equation.delta) if S is not None for t in S.tensors()) // len(samples)
    form = equation.form
    if 2 * numbers < rows * (2 * form.in_ + form.out):
        number = {i: k for k, own in enumerate(samples) for i in own}
        index = torch.tensor([number[i] for i in sorted(flat)], device=_device(equation))
        return [Share(sorted(flat), _mapped(equation, lambda t: t.index_select(0, index)), len(flat), p)]
    if even:
        return [Share(flat, equation, len(samples), p)]
    return [Share(own, _mapped(equation, itemgetter(k)), None, p) for k, own in enumerate(samples)]


def _device(equation: Adapted) -> torch.device:
    return next(t for S in (equation.R, equation.delta, equation.L) if S is not None for t in S.tensors()).device


def _mapped(equation: Adapted, f: Callable[[Tensor], Tensor]) -> Adapted:
    """The equation with f applied to all of its tensors but W."""
    R, delta, L = (None if S is None else S.map(f) for S in (equation.R, equation.delta, equation.L))
    return replace(equation, R=R, delta=delta, L=L, shift=None if equation.shift is None else f(equation.shift))


def _together(layer: Any, kind: Any, shares: list[Share], base: list[int], x: Tensor, batch: Assignment) -> Tensor:
    """y for x (samples, rows, in): each share whose W' is cheaper by it, the others by one product with W."""
    built = [s for s in shares if _builds(kind, layer, s, x)]
    found = [(s.samples, _by_built_weight(layer, kind, s, batch.pick(s.samples).of(x))) for s in built]
    split = [s for s in shares if s not in built]
    rest = sorted([*base, *(i for s in split for i in s.samples)])
    if rest:
        place = {i: k for k, i in enumerate(rest)}
        picks = [(s, batch.pick([place[i] for i in s.samples], len(rest))) for s in split]
        found.append((rest, _split(layer, kind, picks, batch.pick(rest).of(x))))
    return put_together(found) if len(found) > 1 or found[0][0] != rest else found[0][1]


def _builds(kind: Any, layer: Any, share: Share, x: Tensor) -> bool:
    """Whether W + Δ of each adapter is cheaper than its change's own products, and rounds nothing away."""
    equation, W = share.equation, kind.plain(layer)
    chosen = strategy_now()
    if equation.delta is None or equation.R is not None or share.p or W is None or chosen is Strategy.SPLIT:
        return False
    if W.dtype.itemsize < 4 or x.dtype != W.dtype or autocasting.is_on(x.device):
        return False
    tokens = len(share.samples) // (share.stacked or 1) * x.shape[1]
    at = Evaluation(tokens, tuple(W.shape), W.device, W.dtype, False, True)
    size = W.dtype.itemsize
    split, built = equation.delta.cost(tokens, size), equation.delta.cost_of_adding(size)
    return chosen is Strategy.MERGED or at.work(built) < at.work(split)


def _by_built_weight(layer: Any, kind: Any, share: Share, x: Tensor) -> Tensor:
    M = share.equation.dense().to(x.dtype)
    y = share.seen(x) @ M.mT
    b = share.equation.bias(kind.bias(layer))
    return (y if b is None else y + share.spread(b.to(y.dtype))).reshape(*x.shape[:-1], -1)


def _split(layer: Any, kind: Any, picks: list[tuple[Share, Pick]], x: Tensor) -> Tensor:
    """L (W (R x) + Δ x) + b, with W once for all."""
    z = x
    for share, pick in picks:
        if share.equation.R is not None:
            z = pick.replace(z, share.apply(share.equation.R.to(x.dtype), pick.of(x)))
    y = kind.forward(layer, z)
    if torch.is_grad_enabled() and not kind.storage(layer).plain:
        y = y.clone()  # what a packed layer's own autograd function gives out may be a view, which nothing may be written into
    for i, (share, pick) in enumerate(picks):
        if share.equation.delta is not None:
            seen = pick.of(x)
            seen = (dropped(seen, share.p, (id(layer), i)) if share.p else seen).to(y.dtype)
            delta = share.equation.delta.to(y.dtype)
            y = share.add_to(y, delta, seen) if pick.whole else pick.add(y, share.apply(delta, seen))
    for share, pick in picks:
        if share.equation.L is not None or share.equation.shift is not None:
            y = pick.replace(y, _beyond(layer, kind, share, pick.of(y)))
    return y


def _beyond(layer: Any, kind: Any, share: Share, y: Tensor) -> Tensor:
    """y + (L − 1)(y − b) + shift, or y + (L − 1) y + shift where the bias is scaled."""
    equation, b = share.equation, kind.bias(layer)
    Y = share.seen(y)
    if isinstance(equation.L, Diagonal):
        g, fixed = share.spread(equation.L.d), b is not None and not equation.scales_bias
        if y.dtype.itemsize >= 4:
            # g y + (1 − g) b in one pass.
            g = g.to(y.dtype)
            Y = torch.addcmul((1 - g) * b.to(y.dtype), Y, g) if fixed else Y * g
        else:
            # In half precision 1 + ε rounds to 1, but ε itself does not.
            Y = torch.addcmul(Y, Y - b.to(y.dtype) if fixed else Y, (g - 1).to(y.dtype))
    if equation.shift is not None:
        Y = Y + share.spread(equation.shift.to(y.dtype))
    return Y.reshape(y.shape)
