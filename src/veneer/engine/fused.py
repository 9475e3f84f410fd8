"""A frozen linear layer and a low-rank change in one autograd node.

    y = W x + b + B A x;   dx = Wᵀ dy + Aᵀ (Bᵀ dy),   dA = (Bᵀ dy) xᵀ,   dB = dy (A x)ᵀ

Autograd by itself keeps x for the change's products and adds up two gradients of x in a pass of their own; here x is kept once, or what it was made from (see
`sources`), and both gradients are accumulated in place. Dropout of the change's input keeps a seed (see `masks`).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .masks import Mask, mask_of
from .sources import Source, source_of


@dataclass(frozen=True)
class Input:
    """What is known of a layer's input besides its numbers: how it was made, and which of them the change does not see."""

    source: Source | None
    mask: Mask | None


class LinearAndChange(torch.autograd.Function):
    """y = x Wᵀ + b + (keep ∘ x) Aᵀ Bᵀ for x (tokens, in); `origin` is what x was made from, where that is known."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, keep: Tensor | None, origin: Tensor | None, known: Input
    ) -> Tensor:
        y = F.linear(x, W, b)
        h = (x if keep is None else x * keep) @ A.mT
        y.addmm_(h, B.mT)
        ctx.known, ctx.rows = known, x.shape[0]
        for shared in (known.source, known.mask):
            if shared is not None:
                shared.uses += 1
        ctx.save_for_backward(x if origin is None else origin, W, A, B, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, W, A, B, h = ctx.saved_tensors
        source, mask = ctx.known.source, ctx.known.mask
        dh = dy @ B
        keep = None if mask is None else mask.again()
        x = kept if source is None else source.make(kept).reshape(ctx.rows, -1)
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            dx = dy @ W
            if keep is None:
                dx.addmm_(dh, A)
            else:
                dx.add_((dh @ A).mul_(keep))
        if ctx.needs_input_grad[3]:
            dA = dh.mT @ (x if keep is None else x * keep)
        if ctx.needs_input_grad[4]:
            dB = dy.mT @ h
        return dx, None, None, dA, dB, None, None, None


def linear_and_change(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, p: float, reader: Hashable) -> Tensor:
    """W x + b + B A drop(x) on the last dimension of x.

    Args:
        p: the probability with which a number of the change's input is zeroed, and the others are scaled up; 0 for none.
        reader: the layer's identity; layers that read the same x share a mask.
    """
    mask, keep = mask_of(x, p, reader) if p else (None, None)
    source, origin = source_of(x) or (None, None)
    flat = x.flatten(0, -2)
    y = LinearAndChange.apply(
        flat, W, b, A / (1 - p) if p else A, B, keep, None if origin is None else origin.detach(), Input(source, mask)
    )
    return y.unflatten(0, x.shape[:-1])
