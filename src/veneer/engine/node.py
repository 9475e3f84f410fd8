"""A frozen linear layer and its change in one autograd node.

    y = W' x + b = (g ∘ W)(R x) + Δ x + b;   dz = (g ∘ W)ᵀ dy,   dx = Rᵀ dz + Δᵀ dy,   and the operators' own gradients

Autograd by itself keeps an input for each product and adds gradients of x up in passes of their own. Here x is kept once, or what it was made from (see `sources`), every
change is accumulated in place, and W' stands for itself and its parts where that moves fewer bytes (see `choice`). How R and Δ multiply and what their gradients are
is the operators' knowledge. Dropout of the change's input keeps a seed (see `masks`). The row factors g get their gradient from the output alone (see `RowFactors`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import autocasting
from ..operators import Operator, cast, pieces
from .choice import Choice
from .masks import Draw, Mask, mask_of
from .sources import Source, source_of


@dataclass(eq=False, repr=False)
class Linear:
    """The numbers of one evaluation, in one type.

    Args:
        W: (out, in).
        b: (out,), or None.
        g: (out,), the factors of W's rows, or None.
        R: (in × in), or None.
        delta: (out × in) with g in it already, or None.
    """

    W: Tensor
    b: Tensor | None
    g: Tensor | None
    R: Operator | None
    delta: Operator | None

    def rows(self) -> Tensor:
        """g ∘ W."""
        return self.W if self.g is None else self.W * self.g.to(self.W.dtype).unsqueeze(-1)

    def whole(self) -> Tensor:
        """W' = g ∘ (W R) + Δ, outside autograd."""
        M = self.W if self.R is None else self.R.right_of(self.W)
        if self.g is not None:
            M = M * self.g.unsqueeze(-1) if M is self.W else M.mul_(self.g.unsqueeze(-1))
        return M if self.delta is None else self.delta.added_to(M, own=M is not self.W)

    def back_through_rows(self, dy: Tensor, choice: Choice) -> Tensor:
        """(g ∘ W)ᵀ dy."""
        if self.g is None or choice.scales_weight:
            return dy @ self.rows()
        return (dy * self.g.to(dy.dtype)) @ self.W

    def output(self, x: Tensor, keep: Draw | None, choice: Choice) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y for x (tokens, in), and what the operators' gradients want kept; what `keep` drops is not seen by Δ."""
        if choice.merged_forward:
            return F.linear(x, self.whole(), self.b), ()
        z = x if self.R is None else self.R.apply(x)
        if self.g is None or choice.scales_weight:
            y = F.linear(z, self.rows(), self.b)
        else:
            # y + (g − 1)(y − b): in half precision 1 + ε rounds to 1, but ε itself does not.
            y = F.linear(z, self.W, self.b)
            torch.addcmul(y, y if self.b is None else y - self.b, self.g - 1, out=y)
        if self.delta is None:
            return y, ()
        if keep is None:
            return y, self.delta.accumulate(y, x)
        kept = [self.delta.accumulate(y[rows], keep.of(x[rows], rows)) for rows in pieces(x)]
        return y, tuple(torch.cat(parts) for parts in zip(*kept, strict=True))


@dataclass(eq=False, repr=False)
class Known:
    """What is known of one evaluation besides its numbers: how x was made, which of its numbers Δ does not see, what is multiplied with what."""

    source: Source | None
    mask: Mask | None
    choice: Choice
    dtype: torch.dtype
    R: Operator | None
    """As `shape_of` gives it: without tensors, which autograd keeps."""
    delta: Operator | None
    origins: int
    """How many tensors x is made from; 0 where x itself is kept."""

    def linear(self, W: Tensor, b: Tensor | None, g: Tensor | None, tensors: tuple[Tensor, ...]) -> Linear:
        """The same with these tensors, in the type of the computation."""
        n = 0 if self.R is None else len(self.R.tensors())
        R = None if self.R is None else self.R.with_tensors(tensors[:n])
        delta = None if self.delta is None else self.delta.with_tensors(tensors[n:]).holding()
        return Linear(cast(W, self.dtype), None if b is None else cast(b, self.dtype), g, R, delta)


class LinearNode(torch.autograd.Function):
    """y for x (tokens, in); `tensors` are those that x was made from, where that is known, and those of R and then of Δ, once more."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        g: Tensor | None,
        keep: Draw | None,
        R: Operator | None,
        delta: Operator | None,
        known: Known,
        *tensors: Tensor,
    ) -> Tensor:
        origins, tensors = tensors[: known.origins], tensors[known.origins :]
        with autocasting.off(x.device):
            linear = Linear(cast(W, known.dtype), None if b is None else cast(b, known.dtype), g, R, delta)
            y, kept = linear.output(cast(x, known.dtype), keep, known.choice)
        ctx.known, ctx.rows, ctx.dtype, ctx.n = known, x.shape[0], x.dtype, len(tensors)
        _expect(known)
        ctx.save_for_backward(W, b, g, *(origins or (x,)), *tensors, *kept)
        return y

    @staticmethod
    def again(ctx: Any) -> tuple[tuple[Tensor, ...], Draw | None, Linear, tuple[Tensor, ...]]:
        """x or what it is made from, its mask, the layer and what its operators kept."""
        W, b, g, *rest = ctx.saved_tensors
        first = ctx.known.origins or 1
        last = first + ctx.n
        keep = None if ctx.known.mask is None else ctx.known.mask.again()
        return tuple(rest[:first]), keep, ctx.known.linear(W, b, g, tuple(rest[first:last])), tuple(rest[last:])

    @staticmethod
    def inputs(ctx: Any, origins: tuple[Tensor, ...], by_pieces: bool) -> Iterator[tuple[slice, Tensor]]:
        """x in rows that go together: in pieces where that saves making it whole."""
        source, dtype = ctx.known.source, ctx.known.dtype
        if by_pieces and source is not None and source.by_rows and source.alone():
            flat = [t.reshape(ctx.rows, -1) for t in origins]
            yield from ((rows, cast(x, dtype)) for rows, x in source.make_pieces(flat, pieces(*flat)))
            return
        x = cast(origins[0] if source is None else source.make(*origins).reshape(ctx.rows, -1), dtype)
        yield from ((rows, x[rows]) for rows in (pieces(x) if by_pieces and ctx.known.mask is not None else [slice(None)]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        choice = ctx.known.choice
        with autocasting.off(dy.device):
            origins, keep, linear, kept = LinearNode.again(ctx)
            wants = ctx.needs_input_grad
            R, delta = linear.R, linear.delta
            dz = dx = None
            if R is not None:
                dz = linear.back_through_rows(dy, choice)
                if wants[0] and delta is not None:
                    dx = R.transpose().apply(dz)
            elif wants[0]:
                dx = dy @ linear.whole() if choice.merged_backward else linear.back_through_rows(dy, choice)
            of_R, of_delta = Total(), Total()
            by_pieces = all(S is None or S.by_pieces for S in (R, delta))
            for rows, x in LinearNode.inputs(ctx, origins, by_pieces) if R is not None or delta is not None else ():
                if R is not None and dz is not None:
                    of_R.add(R.gradients(x, dz[rows], None))
                if delta is not None:
                    back = None if dx is None or choice.merged_backward else dx[rows]
                    seen = tuple(k[rows] for k in kept)
                    if keep is None:
                        of_delta.add(delta.gradients(x, dy[rows], back, seen))
                    else:
                        of_delta.add(_gradients_of_dropped(delta, x, keep, rows, dy[rows], back, seen))
            if R is not None and dz is not None and wants[0] and dx is None:
                dx = R.transpose().overwrite(dz)
            db = dy.sum(0) if wants[2] else None
        of_origins = (None,) * ctx.known.origins
        return None if dx is None else cast(dx, ctx.dtype), None, db, None, None, None, None, None, *of_origins, *of_R.sums, *of_delta.sums


class Total:
    """Sums of as many tensors as are added at a time."""

    def __init__(self) -> None:
        self.sums: tuple[Tensor, ...] = ()

    def add(self, terms: tuple[Tensor, ...]) -> None:
        """Add one to each; the first are taken as they are, and belong to the total."""
        self.sums = tuple(s.add_(t) for s, t in zip(self.sums, terms, strict=True)) if self.sums else terms


def shape_of(S: Operator | None) -> Operator | None:
    """S with nothing in place of its tensors."""
    return None if S is None else S.map(lambda _: _NOTHING)


_NOTHING = torch.empty(0)


def _expect(known: Known) -> None:
    """One more that will ask for x, and for the mask."""
    for shared in (known.source, known.mask):
        if shared is not None:
            shared.uses += 1


def _gradients_of_dropped(
    delta: Operator, x: Tensor, keep: Draw, rows: slice, dy: Tensor, dx: Tensor | None, kept: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """`delta.gradients` for these rows of the input with what `keep` drops at 0."""
    if dx is None:
        return delta.gradients(keep.of(x, rows), dy, None, kept)
    mask = keep.keep(x.dtype, rows)
    back = torch.zeros_like(mask)
    found = delta.gradients(keep.of(x, rows, mask), dy, back, kept)
    dx.addcmul_(back, mask)
    return found


class RowFactors(torch.autograd.Function):
    """Stands behind y = diag(g) y₀ + b, as which y was computed, and gives g its gradient Σ dy ∘ (y − b) / g without keeping y₀.

    The output is often kept anyway, by an attention or an activation. Where the model edits it in place instead, y₀ is computed again.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor, b: Tensor | None) -> Tensor:
        ctx.mark_dirty(y)
        ctx.node = y.grad_fn
        ctx.save_for_backward(y, g, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        try:
            y, g, b = ctx.saved_tensors
        except RuntimeError as e:
            if "modified by an inplace operation" not in str(e):
                raise
            y, g, b = _output_again(ctx.node)
        # The backward of a batch normalisation of mean b and deviation g has this sum for its factor, in one pass and in float32 or wider.
        wide = y.dtype if y.dtype.itemsize >= 4 else torch.float32
        factors = cast(g, wide)
        mean = torch.zeros_like(factors) if b is None else cast(b, wide)
        norm = torch.ops.aten.native_batch_norm_backward
        _, of_g, _ = norm(dy, y, factors, None, None, mean, factors.reciprocal(), True, 0.0, [False, True, False])
        return dy, cast(of_g, g.dtype), None


def _output_again(node: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    with torch.no_grad(), autocasting.off(node.saved_tensors[0].device):
        _expect(node.known)
        origins, keep, linear, _ = LinearNode.again(node)
        assert linear.g is not None
        ((_, x),) = LinearNode.inputs(node, origins, by_pieces=False)
        return linear.output(x, keep, node.known.choice)[0], linear.g, linear.b


def linear_in_one_node(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    g: Tensor | None,
    R: Operator | None,
    delta: Operator | None,
    choice: Choice,
    dtype: torch.dtype,
    p: float,
    reader: Hashable,
) -> Tensor:
    """(g ∘ W) R x + Δ drop(x) + b on the last dimension of x.

    Args:
        g: (out,), not 0; Δ has it in it already.
        R, delta: in the form that meets tokens (`Operator.for_tokens`), of type `dtype`.
        dtype: the type to compute in.
        p: the probability with which a number of the change's input is zeroed, and the others are scaled up; 0 for none.
        reader: the layer's identity; layers that read the same x share a mask.
    """
    flat = x.flatten(0, -2)
    mask, keep = mask_of(x, p, reader) if p else (None, None)
    if p and delta is not None:
        delta = delta.scaled(1 / (1 - p))
    tensors = tuple(t for S in (R, delta) if S is not None for t in S.tensors())
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (flat, b, g, *tensors))):
        with autocasting.off(x.device):
            of_type = Linear(cast(W, dtype), None if b is None else cast(b, dtype), g, R, delta)
            return of_type.output(cast(flat, dtype), keep, choice)[0].view(*x.shape[:-1], -1)
    source, origins = source_of(x) or (None, ())
    known = Known(source, mask, choice, dtype, shape_of(R), shape_of(delta), len(origins))
    fixed = None if g is None else g.detach()
    y = LinearNode.apply(flat, W, b, fixed, keep, R, delta, known, *(t.detach() for t in origins), *tensors)
    if g is not None and g.requires_grad:
        y = RowFactors.apply(y, g, None if b is None else b.detach().to(dtype))
    return y.view(*x.shape[:-1], -1)
