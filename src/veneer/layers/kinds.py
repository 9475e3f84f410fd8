"""The table of layer kinds, which weights of a module are adapted together, and why a module has none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .base import LayerKind
from .conv import ConvKind
from .embedding import EmbeddingKind
from .linear import LinearKind, TransposedLinearKind
from .parameter import ParameterKind
from .storages import why_packed

KINDS: tuple[LayerKind, ...] = (LinearKind(), TransposedLinearKind(), ConvKind(), EmbeddingKind())


@dataclass(frozen=True)
class Place:
    """One weight that is adapted.

    Args:
        inner: the path of its module below the module that was named.
        kind: how it acts.
        key: what stands between the named module's path and the parameters' names in the file.
    """

    inner: str
    kind: LayerKind
    key: str = ""


def places(module: nn.Module) -> list[Place]:
    """The weights that naming a module adapts; none where it cannot be adapted."""
    kind = next((k for k in KINDS if k.matches(module)), None)
    if kind is not None:
        return [Place("", kind)]
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return [Place("", ParameterKind("weight", "bias"))]
    if isinstance(module, nn.MultiheadAttention):
        own = ["in_proj_weight"] if module.in_proj_weight is not None else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        offset = "in_proj_bias" if len(own) == 1 else None
        found = [Place("", ParameterKind(name, offset), "" if len(own) == 1 else f"{name}.") for name in own]
        return [*found, Place("out_proj", ParameterKind("weight", "bias"), "base_layer.out_proj.")]
    return []


def parameter_place(module: nn.Module, tensor: str) -> Place | None:
    """The place of one bare parameter, or None where it is no matrix and no stack of matrices."""
    kind = ParameterKind(tensor)
    return Place("", kind) if kind.matches(module) else None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of whatever packing."""
    found = places(module)
    return len(found) == 1 and (isinstance(found[0].kind, LinearKind) or isinstance(module, nn.Linear))


def why_not(layer: nn.Module) -> str:
    """Why a layer cannot be adapted, as the end of a sentence."""
    cls = type(layer).__name__
    packed = why_packed(layer)
    if packed is not None:
        return packed
    if isinstance(layer, nn.Linear):
        return f"is a {cls} whose weight is packed ({layer.weight.dtype}), a storage that is not supported"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return f"is a {cls} with max_norm={layer.max_norm}, which rewrites its own weight in every forward"
    if next(layer.children(), None) is not None:
        return f"is a {cls}, a container of layers; name the layers inside it"
    names = ", ".join([*(k.name for k in KINDS), "nn.MultiheadAttention", "bare parameters (target_parameters)"])
    return f"is a {cls}; what can be adapted are: {names}"
