"""The classes that other libraries ask layers and configurations for by `isinstance`, and the functions that they call on models without a wrapper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ... import inject
from ...errors import ConfigError
from ...layers import AdaptedModule, SavedModule, Swapped
from ...layers.views import heads_of
from ...methods.lokr import split
from ...state_dicts import base_of

__all__ = ["AuxiliaryTrainingWrapper", "BaseTunerLayer", "ModulesToSaveWrapper", "factorization"]

BaseTunerLayer = AdaptedModule
ModulesToSaveWrapper = SavedModule
# Asked of modules that say how a file's names become the model's; every module with adapters does (see `layers.file_names`).
AuxiliaryTrainingWrapper = Swapped


class _OfTensors(type):
    """Makes `isinstance` ask what an adapted layer's tensors are called in the file."""

    head: str

    def __instancecheck__(cls, layer: object) -> bool:
        return isinstance(layer, AdaptedModule) and any(h.startswith(cls.head) for h in heads_of(layer))


class LoraLayer(metaclass=_OfTensors):
    """An adapted layer with an adapter of LoRA's tensors."""

    head = "lora_"


class LoHaLayer(metaclass=_OfTensors):
    """An adapted layer with an adapter of LoHa's tensors."""

    head = "hada_"


class LoKrLayer(metaclass=_OfTensors):
    """An adapted layer with an adapter of LoKr's tensors."""

    head = "lokr_"


class PromptLearningConfig:
    """What no configuration of Veneer is: of a method that learns inputs instead of weights."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ConfigError(
            f"{type(self).__name__}: Veneer adapts weights, and has no method that learns prompts; use LoraConfig, or HF PEFT without as_peft()"
        )


class PrefixTuningConfig(PromptLearningConfig):
    """As `PromptLearningConfig`; TRL imports the name."""


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """The two factors that LoKr takes a dimension apart into, the smaller one first."""
    return split(dimension, factor)


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, name) of the module at a path."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str | None = None, layer_cls: type = AdaptedModule) -> list[str] | None:
    """Take an adapter off a model; returns the adapters that are active then.

    Args:
        prefix, layer_cls: of the modules to ask, elsewhere; here the record of what is attached says it.
    """
    base = base_of(model)
    inject.check_names(base, [adapter_name])
    inject.remove(base, adapter_name)
    left = list(inject.record(base).active)
    if not inject.record(base).plans:
        inject.detach(base)
    return left or None


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: type = AdaptedModule) -> None:
    """Make these the active adapters of a model; they train unless `inference_mode`."""
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    inject.activate(base_of(model), names, trainable=not inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters train, or not; those that are not active do not train yet."""
    base = base_of(model)
    names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
    note = inject.check_names(base, sorted(names))
    note.trainable = note.trainable | names if requires_grad else note.trainable - names
    inject.activate(base, note.active)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Nothing to switch off: an adapter's numbers are cast to the type of the activations, never the activations."""
    yield
