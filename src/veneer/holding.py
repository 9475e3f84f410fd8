"""Holding many adapters: what a user says about it on a `PeftModel`, and files that go straight onto the shelf."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from . import files, inject
from .adapting import check_name
from .budget import checked_budget
from .config import PeftConfig
from .errors import StateError
from .packing import Pattern, of_file
from .records import holder_at
from .shelving import keep_to_budget, pack

_NOT_OF_TENSORS = ("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type")
"""Fields of a configuration that say nothing about how an adapter's tensors are used."""


class Holding:
    """The part of `PeftModel` that holds many adapters."""

    peft_config: dict[str, PeftConfig]
    get_base_model: Callable[[], nn.Module]

    def hold(self, attached: int | None = None, device_bytes: int | None = None, offload: str | os.PathLike[str] | None = None) -> None:
        """Keep no more adapters in the model's memory than this, the least recently used first to go; without a number nothing goes.

        An adapter that is not attached is packed: its tensors lie end to end, with a few kilobytes beside them, and the engine reads them where they are. `set_adapter` attaches a
        packed adapter again, bit for bit as it was. Active adapters are never packed, and an adapter whose parameters have gradients is not.

        Args:
            attached: how many adapters are modules of the model.
            device_bytes: how many bytes of packed adapters stay on the model's device.
            offload: where the rest of them go: "cpu", or a directory, in which each gets a folder in the public format. `delete_adapter` removes the folder that was written
                for an adapter; `unload` leaves them.

        Raises:
            ConfigError: numbers or a place that cannot be used.
            StateError: more adapters are active than may be attached, or the others cannot be packed; nothing is changed.

        >>> import torch
        >>> from veneer import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]), "a")
        >>> model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
        >>> model.hold(attached=1)
        >>> model.adapter_locations
        {'a': 'attached', 'b': 'packed'}
        >>> model.set_adapter("b")
        >>> model.adapter_locations
        {'a': 'packed', 'b': 'attached'}
        """
        model = self.get_base_model()
        shelf = inject.record(model).shelf
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        place = offload if offload is None or offload == "cpu" else Path(offload)
        before, shelf.budget = shelf.budget, checked_budget(attached, device_bytes, place, device)
        try:
            keep_to_budget(model)
        except StateError:
            shelf.budget = before
            raise

    def pack_adapter(self, adapter_name: str) -> None:
        """Take an inactive adapter off the model's modules and lay its tensors end to end; its name still works everywhere.

        Raises:
            StateError: it is not there, active, merged, or being trained; nothing is changed.
        """
        pack(self.get_base_model(), adapter_name)

    @property
    def adapter_locations(self) -> dict[str, str]:
        """Where each adapter is: "attached" to the model's modules, "packed" beside them, or offloaded to "cpu" or "disk"."""
        shelf = inject.record(self.get_base_model()).shelf
        return {name: shelf.where(name) for name in self.peft_config}


def shelf_key(config: PeftConfig, autocast_adapter_dtype: bool) -> str:
    """What files must have in common to be packed alike."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_OF_TENSORS}
    return json.dumps([config.peft_type, fields, autocast_adapter_dtype], sort_keys=True, default=str)


def note_key(model: nn.Module, name: str, key: str) -> None:
    """Note that further files of this key are packed like this packed adapter."""
    shelf = inject.record(model).shelf
    if name in shelf:
        shelf.known[key] = shelf.waiting[name].packed.pattern


def shelve(
    model: nn.Module, name: str, config: PeftConfig, tensors: Mapping[str, Tensor], directory: Path, key: str, *, is_trainable: bool
) -> bool:
    """Put a file's tensors straight onto the shelf, where one of equal configuration was there before; whether that could be done.

    Raises:
        ConfigError: a name that cannot be used.
        AdapterFileError: NaN or infinite numbers, or label names that do not fit; the model is as it was.
    """
    note = inject.record(model)
    pattern = note.shelf.known.get(key)
    if pattern is None or pattern.beside or config.writes_shared or config.bias != "none":
        return False
    if tensors.keys() != pattern.names.keys() or any(t.shape != pattern.names[k].shape for k, t in tensors.items()):
        return False
    check_name(name, note.configs)
    waiting = of_file(pattern, tensors, _devices(model, pattern))
    if not all(files.finite(t) for t in waiting.packs if t.is_floating_point()):
        files.check_tensors(tensors, tensors, str(directory))  # which says the name
    names = files.label_names(model, pattern.plan, tensors, directory)
    vars(config).update(pattern.plan.rewritten)
    config.inference_mode = not is_trainable
    if is_trainable:
        note.trainable.add(name)
    inject.enlist(model, pattern.plan, config, name)
    if pattern.shared is not None:
        note.shared[name] = pattern.shared
    if names is not None:
        note.naming.give(model, name, names)
    note.shelf.put(name, waiting, config, note.labels.get(name))
    note.shelf.settle()
    return True


def _devices(model: nn.Module, pattern: Pattern) -> list[torch.device]:
    """Where each pack is read."""
    paths = {s.pack: path for path, places in pattern.places.items() for place in places.values() for s in place.spans.values()}
    paths |= {s.pack: path for path, (_, spans) in pattern.copies.items() for s in spans.values()}
    return [next(holder_at(model, paths[i]).parameters()).device for i in range(len(pattern.packs))]
