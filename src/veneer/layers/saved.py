"""Modules that train whole beside the adapter (`modules_to_save`): one full copy per adapter, the original kept frozen."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import nn

from .swap import ADAPTERS, Swapped, own_class, swap


class SavedModule(Swapped):
    """Mixed in before a module's own class; the active adapter's copy runs in its place."""

    PREFIX: ClassVar[str] = "Saved"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.veneer_active:
            return self.base_forward(*args, **kwargs)
        return self.veneer[self.veneer_active[-1]](*args, **kwargs)


def save_module(module: nn.Module, adapter_name: str) -> SavedModule:
    """Give `module` a trainable copy under the adapter's name, made from its own values."""
    original = _original(module) if isinstance(module, SavedModule) else copy.deepcopy(module)
    if not isinstance(module, SavedModule):
        swap(module, SavedModule)
    assert isinstance(module, SavedModule)
    module.veneer[adapter_name] = original
    return module


def _original(module: SavedModule) -> nn.Module:
    """A copy of the module as it was before any adapter."""
    new = own_class(module).__new__(own_class(module))
    kept = {k: v for k, v in module.__dict__.items() if k not in type(module).ATTRIBUTES}
    kept["_modules"] = {k: v for k, v in module._modules.items() if k != ADAPTERS}
    new.__dict__.update(copy.deepcopy(kept))
    return new
