"""Merge adapters into the frozen weights, and take them out again bit for bit.

A merge writes W' = L (W R + Δ) over the weight, one layer at a time. The original is kept beside the layer until it is unmerged, because
subtracting Δ again in half precision does not give W back; merging for good keeps nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm

from .errors import ConfigError, StateError
from .inject import activate, adapted_modules, detach, record, saved_modules
from .labels import Labels
from .layers import set_outputs
from .layers.merged import MergedWeight, merge_again, needs_check, put_back, refuse_lost_shift, refuse_not_finite, write_merged
from .listing import aligned

logger = logging.getLogger("veneer")


@dataclass
class MergeReport:
    """What merging lost to rounding, weight by weight; printing it shows a table.

    >>> print(MergeReport([MergedWeight("0", "bitsandbytes nf4", 8.0, 1.0, 0.5)]))
    layer  storage           change  lost  of the change  of the weight
    0      bitsandbytes nf4       1   0.5          50.0%         6.250%
    """

    weights: list[MergedWeight] = field(default_factory=list)

    def __str__(self) -> str:
        head = ("layer", "storage", "change", "lost", "of the change", "of the weight")
        rows = [(w.path, w.storage, f"{w.change:.3g}", f"{w.error:.3g}", f"{w.of_change:.1%}", f"{w.of_weight:.3%}") for w in self.weights]
        return aligned([head, *rows], right=[2, 3, 4, 5])


def merge(
    model: nn.Module,
    *,
    names: Sequence[str] | None = None,
    keep: bool = True,
    safe: bool = False,
    originals_device: str | torch.device | None = None,
    progress: bool = False,
) -> MergeReport:
    """Write the active adapters into the weights; what rounding took from them is returned.

    Args:
        names: merge exactly these instead of the active ones; they become the active ones.
        keep: keep the originals, so that `unmerge` can restore them.
        originals_device: where they are kept; None leaves them where they are.
        progress: show a bar.
        safe: look for NaN and infinities in every merged weight first, and merge none if there are any; done anyway where a weight is packed.

    Raises:
        ConfigError: a device that is none, or that holds no numbers.
        StateError: already merged, not finite, or a bias for a layer that has none; the model is as it was.
    """
    device = None if originals_device is None else _device(model, originals_device)
    before = record(model).active
    if names is not None:
        activate(model, names)
    active = [(p, m, t) for p, m in adapted_modules(model) for t in m.veneer_kinds if next(m.adapters(t), None) is not None]
    try:
        for path, module, tensor in active:
            if module.veneer_merged:
                raise StateError(f"{path} is merged already; call unmerge_adapter() first")
            refuse_lost_shift(module, tensor, path)
            if safe or needs_check(module, tensor):
                refuse_not_finite(module, tensor, path)
    except StateError:
        activate(model, before)
        raise
    shared = _owners(model)
    report = MergeReport()
    try:
        for path, module, tensor in tqdm(active, desc="merging", unit="layer", disable=not progress):

            def elsewhere(name: str, own: nn.Parameter, path: str = path) -> bool:
                if shared[id(own)] > 1:
                    logger.info("%s shares its %s with another module, which keeps the unmerged one", path, name)
                return shared[id(own)] > 1

            called = path if module.veneer_kinds[tensor].called else f"{path}.{tensor}"
            report.weights.append(write_merged(module, tensor, called, keep=keep, originals_device=device, elsewhere=elsewhere))
    except BaseException:
        if keep:
            unmerge(model)
            activate(model, before)
        raise
    return report


def _device(model: nn.Module, said: str | torch.device) -> torch.device:
    try:
        device = torch.device(said)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"originals_device={said!r} cannot hold the original weights: {e}") from e
    if device.type == "meta":
        raise ConfigError(f"originals_device={said!r} holds no numbers, so the original weights would be lost; say 'cpu', or a GPU")
    there = torch.empty(0, device=device)
    for p in model.parameters():
        if type(p.data) is torch.Tensor and not torch._has_compatible_shallow_copy_type(p.data, there):
            raise ConfigError(
                f"originals_device={said!r} cannot hold the original weights: a parameter on {p.device} cannot be moved there and stay the same "
                "object; leave originals_device out"
            )
    return device


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, the very tensors that were there."""
    for _, module in adapted_modules(model):
        put_back(module)


@torch.no_grad()
def merge_and_unload(
    model: nn.Module, *, names: Sequence[str] | None = None, safe: bool = False, progress: bool = False, report: MergeReport | None = None
) -> nn.Module:
    """Merge for good: the model with the adapters in its weights, saved modules in place, and no trace of Veneer.

    Args:
        report: gets what rounding took from each weight.
    """
    merged = [(module, module.veneer_merged_names) for _, module in adapted_modules(model)]
    unmerge(model)
    try:
        found = merge(model, names=names, keep=False, safe=safe, progress=progress)
    except StateError:
        for module, before in merged:
            merge_again(module, before)
        raise
    if report is not None:
        report.weights[:] = found.weights
    for _, saved in saved_modules(model):
        if saved.veneer_active:
            _copy_values(saved, saved.veneer[saved.veneer_active[-1]])
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
