"""What is attached where: the state of every module with adapters, and of the whole model, as plain records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .inject import record
from .layers import AdaptedModule, Swapped
from .layers.storages import number_of
from .layers.swap import own_class
from .layers.switches import disable_adapters, held_adapters
from .state_dicts import base_of

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The state of one module with adapters.

    Args:
        name: its path, which begins with `model.` in a PeftModel.
        module_type: the method and the module's class.
        enabled: whether its active adapters run.
        active_adapters, merged_adapters: names.
        requires_grad: whether an attached adapter's parameters do, by name; "irregular" where some do.
        available_adapters: names, sorted, those of packed adapters too.
        devices: of the parameters, by attached adapter's name.
        quantization_backend: how the frozen weight is packed; None for plain numbers.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The state of all modules with adapters together; "irregular" says that they differ.

    Args:
        base_model_type: the frozen model's class.
        adapter_model_type: the class of what stands around it; "None" where nothing does.
        peft_types: the methods, by adapter name.
        trainable_params, total_params: numbers of parameters.
        num_adapter_layers: modules with adapters.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices, quantization_backend: as of the modules.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every module with adapters.

    Args:
        model: a PeftModel, or a model with injected adapters.

    Raises:
        StateError: no adapter is attached.

    >>> import torch
    >>> from veneer import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
    >>> [(s.name, s.module_type, s.active_adapters) for s in get_layer_status(model)]
    [('model.0', 'lora.Linear', ['default'])]
    """
    base = base_of(model)
    record(base)
    prefix = "" if base is model else "model."
    return [_of_module(prefix + path, m) for path, m in base.named_modules() if isinstance(m, Swapped)]


def _of_module(name: str, module: Swapped) -> TunerLayerStatus:
    own = own_class(module).__name__
    note, kind, merged, storage = module.veneer_record, own, [], None
    names = [*module.veneer, *note.shelf.at(module.veneer_path)]
    if isinstance(module, AdaptedModule):
        methods = list(dict.fromkeys(note.configs[n].peft_type.lower() for n in names))
        kind = f"{'+'.join(methods)}.{own}"
        merged = list(module.veneer_merged_names)
        packing = next(iter(module.veneer_kinds.values())).storage(module).name
        storage = None if packing == "float" else packing
    parts = {n: list(part.parameters()) for n, part in module.veneer.items()}
    return TunerLayerStatus(
        name,
        kind,
        enabled=not disable_adapters(module),
        active_adapters=held_adapters(module),
        merged_adapters=merged,
        requires_grad={n: _common([p.requires_grad for p in ps], default=False) for n, ps in parts.items()},
        available_adapters=sorted(names),
        devices={n: sorted({p.device.type for p in ps}) for n, ps in parts.items()},
        quantization_backend=storage,
    )


def _common(values: Iterable[Any], *, default: Any) -> Any:
    """What all values are, or "irregular"."""
    found = list(values)
    if not found:
        return default
    return found[0] if all(v == found[0] for v in found) else "irregular"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all modules with adapters together.

    Args:
        model: a PeftModel, or a model with injected adapters.

    Raises:
        StateError: no adapter is attached.
    """
    layers, base = get_layer_status(model), base_of(model)
    configs = record(base).configs
    names = sorted({n for s in layers for n in s.available_adapters})

    def by_name(field: str) -> dict[str, list[Any]]:
        return {n: [getattr(s, field)[n] for s in layers if n in getattr(s, field)] for n in names}

    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type="None" if base is model else type(model).__name__,
        peft_types={n: c.peft_type.value for n, c in configs.items()},
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_params=sum(number_of(p) for p in model.parameters()),
        num_adapter_layers=len(layers),
        enabled=_common((s.enabled for s in layers), default=True),
        active_adapters=_common((s.active_adapters for s in layers if s.active_adapters), default=[]),
        merged_adapters=_common((s.merged_adapters for s in layers if "." in s.module_type), default=[]),
        requires_grad={n: _common(v, default=False) for n, v in by_name("requires_grad").items()},
        available_adapters=names,
        devices={n: sorted({d for one in v for d in one}) for n, v in by_name("devices").items()},
        quantization_backend=_common((s.quantization_backend for s in layers if s.quantization_backend), default=None),
    )
