"""Merge adapters into the frozen weights, and take them out again bit for bit.

A merge writes W' = L (W R + Δ) over the weight, one layer at a time. The original is kept beside the layer until it is unmerged, because
subtracting Δ again in half precision does not give W back; merging for good keeps nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import StateError
from .inject import activate, adapted_layers, detach, record, saved_modules
from .layers import AdaptedLayer

logger = logging.getLogger("veneer")


@torch.no_grad()
def merged_matrix(layer: AdaptedLayer) -> Tensor:
    """W' of a layer's active adapters, in float32 or wider: (out, in)."""
    own = layer.veneer_kind.matrix(layer)
    total = None
    for equation, _ in layer.equations():
        matrix = equation.dense().to(torch.promote_types(own.dtype, torch.float32))
        total = matrix if total is None else total + (matrix - own)
    assert total is not None
    return total


def merge(model: nn.Module, *, names: Sequence[str] | None = None, keep: bool = True, safe: bool = False, progress: bool = False) -> None:
    """Write the active adapters into the weights.

    Args:
        names: merge exactly these instead of the active ones; they become the active ones.
        keep: keep the originals, so that `unmerge` can restore them.
        progress: show a bar.
        safe: look for NaN and infinities in every merged weight first, and merge none if there are any.

    Raises:
        StateError: already merged, or not finite; the model is as it was.
    """
    if names is not None:
        activate(model, names)
    layers = [(p, layer) for p, layer in adapted_layers(model) if layer.veneer_active]
    for path, layer in layers:
        if layer.veneer_merged is not None:
            raise StateError(f"{path} is merged already; call unmerge_adapter() first")
    if safe:
        for path, layer in layers:
            if not bool(merged_matrix(layer).isfinite().all()):
                raise StateError(f"merging would write NaN or infinite numbers into {path}; nothing was merged")
    shared = _owners(model)
    for path, layer in tqdm(layers, desc="merging", unit="layer", disable=not progress):
        matrix = merged_matrix(layer)
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        if shared[id(weight)] > 1:
            logger.info("%s shares its weight with another module, which keeps the unmerged one", path)
        if keep or shared[id(weight)] > 1:
            layer.veneer_merged = (weight,)
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        layer.veneer_kind.write(layer, matrix)
    if not keep:
        for _, layer in layers:
            layer.veneer_merged = None


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, the very tensors that were there."""
    for _, layer in adapted_layers(model):
        if layer.veneer_merged is not None:
            layer.weight = layer.veneer_merged[0]
            layer.veneer_merged = None


@torch.no_grad()
def merge_and_unload(model: nn.Module, *, names: Sequence[str] | None = None, safe: bool = False, progress: bool = False) -> nn.Module:
    """Merge for good: the model with the adapters in its weights, saved modules in place, and no trace of Veneer."""
    unmerge(model)
    merge(model, names=names, keep=False, safe=safe, progress=progress)
    for _, module in saved_modules(model):
        if module.veneer_active:
            _copy_values(module, module.veneer[module.veneer_active[-1]])
    record(model).first_biases.clear()
    return detach(model)


def _copy_values(module: nn.Module, source: nn.Module) -> None:
    target = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in [*source.named_parameters(), *source.named_buffers()]:
        target[name].copy_(value)


def _owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter."""
    count: dict[int, int] = {}
    holders: Iterable[nn.Module] = model.modules()
    for module in holders:
        for p in module._parameters.values():
            if p is not None:
                count[id(p)] = count.get(id(p), 0) + 1
    return count
