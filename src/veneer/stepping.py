"""Schedules run by themselves: hooks around every optimiser's step find the models whose adapters it trains.

So a method with a schedule (AdaLoRA, constrained OFT) works in any training loop without a line from the user, and a step is an optimiser's step:
accumulated batches, loss scaling and skipped steps are none of its concern.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import wrapt
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .config import PeftConfig
from .inject import RECORD, record
from .layers import Adapter
from .methods.base import Schedule
from .records import attached_at

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_installed: list[Any] = []


def watch(model: nn.Module) -> None:
    """Run the schedules of this model's adapters from now on."""
    _models.add(model)
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before))
        _installed.append(register_optimizer_step_post_hook(_after))
        wrapt.wrap_function_wrapper(LRScheduler, "__init__", _note_length)


def _note_length(wrapped: Any, scheduler: LRScheduler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell schedules how many steps a learning-rate scheduler was made for, where it says so."""
    wrapped(*args, **kwargs)
    steps = steps_of(scheduler)
    if steps is not None:
        for config, _schedule, _layers in trained_by(scheduler.optimizer):
            config.set_total_steps(steps)


def steps_of(scheduler: LRScheduler) -> int | None:
    """The optimiser steps a scheduler was made for: those of `OneCycleLR`, and of transformers' with `num_training_steps`.

    The others count whatever their caller steps them by, often epochs.
    """
    found = getattr(scheduler, "total_steps", None)
    if found is None:
        for part in getattr(scheduler, "lr_lambdas", []):
            found = getattr(part, "keywords", {}).get("num_training_steps", found)
    return None if found is None else int(found)


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
            layers = [attached_at(model, site, name) for site in note.plans[name].sites]
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
