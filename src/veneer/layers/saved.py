"""Modules that train whole beside the adapter (`modules_to_save`): one full copy per adapter, the original kept frozen."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import nn

from .lent import Lent, lent_method
from .mixed import by_adapter, refuse_other_states
from .swap import ADAPTERS, Swapped, swap, unadapted


class SavedModule(Swapped):
    """Mixed in before a module's own class; the active adapter's copy runs in its place."""

    PREFIX: ClassVar[str] = "Saved"

    modules_to_save = Lent(lambda self: self.veneer)
    original_module = Lent(unadapted)

    @lent_method
    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The names in the file → those in the model, of one adapter's copy, both relative to this module."""
        held = self.veneer[adapter_name].state_dict() if adapter_name in self.veneer else {}
        return {key: f"{ADAPTERS}.{adapter_name}.{key}" for key in held}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.veneer_record.batches.current()
        if batch is not None and batch.single is None:
            return by_adapter(self, self.forward, batch, args, kwargs)
        if batch is not None:
            refuse_other_states(self)
        names = self.veneer_active[-1:] if batch is None else [batch.single]
        chosen = self.copy_of(names[0]) if names else None
        return self.base_forward(*args, **kwargs) if chosen is None else chosen(*args, **kwargs)

    def copy_of(self, name: str) -> nn.Module | None:
        """One adapter's copy of this module, attached or made of what is packed; None where it has none."""
        own = self.veneer._modules.get(name)
        packed = self.veneer_record.shelf.fetch(name) if own is None and self.veneer_record is not None else None
        return own if packed is None else packed.copy_of(self)


def save_module(module: nn.Module, adapter_name: str) -> SavedModule:
    """Give `module` a trainable copy under the adapter's name, made from its own values."""
    original = _original(module) if isinstance(module, SavedModule) else copy.deepcopy(module)
    if not isinstance(module, SavedModule):
        swap(module, SavedModule)
    assert isinstance(module, SavedModule)
    module.veneer[adapter_name] = original
    return module


def takes_outputs(layer: nn.Module) -> bool:
    """Whether a layer can have another number of outputs."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups == 1)


def set_outputs(layer: nn.Module, outputs: int) -> None:
    """Give a linear layer or a convolution another number of outputs; its numbers are to be read from a file."""
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", outputs)
    for name, own in layer._parameters.items():
        if own is not None:
            layer._parameters[name] = nn.Parameter(own.detach().new_zeros(outputs, *own.shape[1:]), requires_grad=own.requires_grad)


def _original(module: SavedModule) -> nn.Module:
    """A copy of the module as it was before any adapter."""
    return copy.deepcopy(unadapted(module))
