"""Switches on one module that holds adapters, for code that walks over a model's modules: which adapters are active, which are there.

What is active is one fact about the whole model, and lies in the record that `inject` keeps; a module's switches turn the module and the record together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import StateError

if TYPE_CHECKING:
    from .swap import Swapped


def set_adapter(self: Swapped, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make these the active adapters; they train unless `inference_mode`, the others do not."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    note = self.veneer_record
    note.check(names)
    note.trainable = note.trainable - set(names) if inference_mode else note.trainable | set(names)
    note.active = tuple(names)
    turn(self, note.active, note.trainable)


def turn(holder: Swapped, active: Sequence[str], trainable: set[str]) -> None:
    """Let exactly these adapters run in one module, and let those of them train that do."""
    holder.veneer_active = tuple(n for n in active if n in holder.veneer)
    for name, part in holder.veneer.items():
        part.requires_grad_(name in active and name in trainable)


def enable_adapters(self: Swapped, enabled: bool) -> None:
    """Let the active adapters run, or the module alone."""
    self.veneer_active = tuple(n for n in self.veneer_record.active if n in self.veneer) if enabled else ()


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
    return [n for n in self.veneer_record.active if n in self.veneer]


def disable_adapters(self: Swapped) -> bool:
    """Whether this module runs without the adapters that are active."""
    return bool(held_adapters(self)) and not self.veneer_active
