"""Switches on one module that holds adapters, for code that walks over a model's modules: which adapters are active, which are there.

What is active is one fact about the whole model, and lies in the record that `inject` keeps; a module's switches turn the module and the record together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..errors import StateError

if TYPE_CHECKING:
    from .swap import Swapped


def set_adapter(self: Swapped, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make these the active adapters; they train unless `inference_mode`, the others do not."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    note = self.veneer_record
    note.check(names)
    waiting = [n for n in names if n in note.shelf]
    if waiting:
        raise StateError(f"adapter {waiting[0]!r} is packed, and one module cannot attach it; use set_adapter of the model")
    note.trainable = note.trainable - set(names) if inference_mode else note.trainable | set(names)
    note.active = tuple(names)
    note.turned |= set(names)
    for name, held in self.veneer.items():
        train((m._parameters for m in held.modules()), name in note.active and name in note.trainable)
    self.veneer_active = tuple(held_adapters(self))


def train(parameters: Iterable[dict[str, nn.Parameter | None]], on: bool) -> None:
    """Let parameters require grad, or not; only those that change are touched."""
    for own in parameters:
        for p in own.values():
            if p is not None and p.requires_grad is not on:
                p.requires_grad = on


def enable_adapters(self: Swapped, enabled: bool) -> None:
    """Let the active adapters run, or the module alone."""
    self.__dict__["veneer_active"] = tuple(held_adapters(self)) if enabled else ()


def delete_adapter(self: Swapped, adapter_name: str) -> None:
    """Take one adapter off this module; every module that holds it must be asked."""
    note = self.veneer_record
    if adapter_name in note.plans and note.plans[adapter_name].biases:
        raise StateError(f"{adapter_name!r} trains the base's biases, which only the model can put back; use delete_adapter of the model")
    note.forget(adapter_name)
    if adapter_name in self.veneer:
        del self.veneer[adapter_name]
    self.veneer_active = tuple(n for n in self.veneer_active if n != adapter_name)


def active_adapters(self: Swapped) -> list[str]:
    """The model's active adapters, whether or not this module holds them and is enabled."""
    return list(self.veneer_record.active)


def held_adapters(self: Swapped) -> list[str]:
    """The active adapters that this module holds, whether or not it is enabled."""
    return [n for n in self.veneer_record.active if n in self.veneer._modules]


def disable_adapters(self: Swapped) -> bool:
    """Whether this module runs without the adapters that are active."""
    return bool(held_adapters(self)) and not self.veneer_active
