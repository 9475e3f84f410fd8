"""Merge adapters into the frozen weights, and take them out again bit for bit.

A merge writes W' = L (W R + Δ) over the weight, one layer at a time. The original is kept beside the layer until it is unmerged, because
subtracting Δ again in half precision does not give W back; merging for good keeps nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from .errors import StateError
from .inject import activate, adapted_modules, detach, record, saved_modules
from .labels import Labels
from .layers import set_outputs
from .layers.merged import put_back, refuse_lost_shift, refuse_not_finite, write_merged

logger = logging.getLogger("veneer")


def merge(model: nn.Module, *, names: Sequence[str] | None = None, keep: bool = True, safe: bool = False, progress: bool = False) -> None:
    """Write the active adapters into the weights.

    Args:
        names: merge exactly these instead of the active ones; they become the active ones.
        keep: keep the originals, so that `unmerge` can restore them.
        progress: show a bar.
        safe: look for NaN and infinities in every merged weight first, and merge none if there are any.

    Raises:
        StateError: already merged, not finite, or a bias for a layer that has none; the model is as it was.
    """
    if names is not None:
        activate(model, names)
    active = [(p, m, t) for p, m in adapted_modules(model) for t in m.veneer_kinds if next(m.adapters(t), None) is not None]
    for path, module, tensor in active:
        if module.veneer_merged:
            raise StateError(f"{path} is merged already; call unmerge_adapter() first")
        refuse_lost_shift(module, tensor, path)
        if safe:
            refuse_not_finite(module, tensor, path)
    shared = _owners(model)
    for path, module, tensor in tqdm(active, desc="merging", unit="layer", disable=not progress):

        def elsewhere(name: str, own: nn.Parameter, path: str = path) -> bool:
            if shared[id(own)] > 1:
                logger.info("%s shares its %s with another module, which keeps the unmerged one", path, name)
            return shared[id(own)] > 1

        write_merged(module, tensor, keep=keep, elsewhere=elsewhere)


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, the very tensors that were there."""
    for _, module in adapted_modules(model):
        put_back(module)


@torch.no_grad()
def merge_and_unload(model: nn.Module, *, names: Sequence[str] | None = None, safe: bool = False, progress: bool = False) -> nn.Module:
    """Merge for good: the model with the adapters in its weights, saved modules in place, and no trace of Veneer."""
    unmerge(model)
    merge(model, names=names, keep=False, safe=safe, progress=progress)
    for _, module in saved_modules(model):
        if module.veneer_active:
            _copy_values(module, module.veneer[module.veneer_active[-1]])
    record(model).first_biases.clear()
    record(model).naming = Labels()  # those of the head that is now the model's own stay
    return detach(model)


def _copy_values(module: nn.Module, source: nn.Module) -> None:
    for name, trained in source.named_parameters():
        if trained.shape != module.get_parameter(name).shape:
            set_outputs(module.get_submodule(name.rpartition(".")[0]), trained.shape[0])
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
