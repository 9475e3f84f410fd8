"""The table of layer kinds, and why a layer has none."""

from __future__ import annotations

from torch import nn

from .base import LayerKind
from .linear import LinearKind

KINDS: tuple[LayerKind, ...] = (LinearKind(),)


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The kind that serves a layer, or None."""
    return next((k for k in KINDS if k.matches(layer)), None)


def why_not(layer: nn.Module) -> str:
    """Why a layer cannot be adapted, as the end of a sentence."""
    cls = type(layer).__name__
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"is the output projection of nn.MultiheadAttention ({cls}), whose weight its parent reads without calling the layer"
    if isinstance(layer, nn.Linear):
        return f"is a {cls} whose weight is packed ({layer.weight.dtype}), a storage that is not supported"
    if next(layer.children(), None) is not None:
        return f"is a {cls}, a container of layers; name the layers inside it"
    names = ", ".join(k.name for k in KINDS)
    return f"is a {cls}; the layer kinds that can be adapted are: {names}"
