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
    turn(self, note.active, note.trainable)


def turn(holder: Swapped, active: Sequence[str], trainable: set[str], changed: Iterable[str] | None = None) -> None:
    """Let exactly these adapters run in one module, and let those of them train that do.

    Args:
        changed: the adapters that may have to be turned, beside those that run here; all of the module's if None.
    """
    # Past the look-ups of nn.Module, which take longer than all the rest: switching a large model should not be noticed.
    own = holder.__dict__
    held = own["_modules"]["veneer"].__dict__["_modules"]
    for name in list(held) if changed is None else {*changed, *own["veneer_active"]}:
        found = held.get(name)
        if found is not None:
            train(found, name in active and name in trainable)
    own["veneer_active"] = tuple([n for n in active if n in held])


def train(module: nn.Module, on: bool) -> None:
    """Let the parameters of a module require grad, or not; only those that change are touched."""
    left: list[nn.Module | None] = [module]
    for m in left:
        if m is not None:
            own = m.__dict__
            for p in own["_parameters"].values():
                if p is not None and p.requires_grad is not on:
                    p.requires_grad = on
            left += own["_modules"].values()


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
