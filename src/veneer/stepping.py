"""Schedules run by themselves: hooks around every optimiser's step find the models whose adapters it trains.

So a method with a schedule (AdaLoRA, constrained OFT) works in any training loop without a line from the user, and a step is an optimiser's step:
accumulated batches, loss scaling and skipped steps are none of its concern.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .config import PeftConfig
from .inject import RECORD, adapter_of, record
from .layers import Adapter
from .methods.base import Schedule

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_installed: list[Any] = []


def watch(model: nn.Module) -> None:
    """Run the schedules of this model's adapters from now on."""
    _models.add(model)
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before))
        _installed.append(register_optimizer_step_post_hook(_after))


def trained_by(optimizer: Optimizer) -> Iterator[tuple[PeftConfig, Schedule, list[Adapter]]]:
    """The adapters with a schedule that this optimiser trains."""
    own: set[int] | None = None
    for model in list(_models):
        if RECORD not in model.__dict__:
            continue
        note = record(model)
        for name in note.active:
            if name not in note.schedules or name not in note.trainable:
                continue
            own = {id(p) for g in optimizer.param_groups for p in g["params"]} if own is None else own
            layers = [adapter_of(model, site, name) for site in note.plans[name].sites]
            if any(id(p) in own for layer in layers for p in layer.parameters()):
                config, schedule = note.schedules[name]
                yield config, schedule, layers


@torch.no_grad()
def _before(optimizer: Optimizer, *_: Any) -> None:
    for _config, schedule, layers in trained_by(optimizer):
        schedule.before_step(layers)


@torch.no_grad()
def _after(optimizer: Optimizer, *_: Any) -> None:
    for _config, schedule, layers in trained_by(optimizer):
        schedule.after_step(layers)
