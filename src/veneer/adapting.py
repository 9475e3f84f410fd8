"""Put an adapter on a model: plan, attach, note. What `PeftModel` does to its base model and `inject_adapter_in_model` to a model without a wrapper."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping

from torch import Tensor, nn

from . import inject
from .config import PREFIX, PeftConfig, matches
from .errors import ConfigError
from .layers import Swapped
from .planning import plan
from .targets import base_modules

logger = logging.getLogger("veneer")

_ADAPTER_NAME = r"[A-Za-z0-9_-]+"


def put_on(
    model: nn.Module,
    config: PeftConfig,
    name: str,
    *,
    fresh: bool = True,
    drawn: bool | None = None,
    autocast_adapter_dtype: bool = True,
    only: PeftConfig | None = None,
) -> None:
    """Attach one adapter, inactive.

    Args:
        fresh: a new adapter, for which new heads are added and every listed name must match; False when one is read from a file.
        drawn: draw its first values; as `fresh` if None.
        only: plan by this configuration, which differs in its targets; `config` is the one that is kept.

    Raises:
        ConfigError, TargetError: the model is as it was.
    """
    attached = inject.record(model).configs if inject.RECORD in model.__dict__ else {}
    check_name(name, attached)
    others = [n for n, c in attached.items() if c.bias != "none"]
    if others and config.bias != "none":
        raise ConfigError(f"adapter {others[0]!r} trains the base's biases already, and there is only one set of them; use bias='none'")
    p = plan(model, only or config, fresh=fresh)
    if p.new_heads:
        config.modules_to_save = sorted({*(config.modules_to_save or []), *p.new_heads})
        logger.warning("newly initialised, so trained and saved with the adapter: %s", ", ".join(p.new_heads))
    if p.still_random:
        logger.warning(
            "newly initialised and not trained: %s; name them in modules_to_save if the task needs them", ", ".join(p.still_random)
        )
    inject.attach(model, p, config, name, fresh=fresh if drawn is None else drawn, autocast_adapter_dtype=autocast_adapter_dtype)
    config.base_model_name_or_path = config.base_model_name_or_path or _name_of(model)
    # Written out, because other readers of the file have other defaults, and know neither older names nor roles.
    vars(config).update({} if only else p.rewritten)
    if inject.record(model).schedules:
        from .stepping import watch

        watch(model)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter on a model in place, without a wrapper, and make it the active one; the same model is returned.

    The adapter's parameters have the type of the layer's own. `model.peft_config` holds the configurations of what is attached.

    Args:
        low_cpu_mem_usage: leave the adapter at zero, to be filled by `set_peft_model_state_dict`.
        state_dict: adapt exactly the layers that it has tensors of, whatever `target_modules` says.

    Raises:
        ConfigError, TargetError: as for `get_peft_model`; the model is as it was.

    >>> import torch
    >>> from veneer import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(4, 3)))
    >>> model[0].lora_A["default"].weight.shape
    torch.Size([2, 4])
    """
    if "get_base_model" in dir(type(model)):
        raise ConfigError("this model is a PeftModel; use its add_adapter(name, config)")
    if inject.RECORD in model.__dict__:
        _forget_what_was_unloaded(model)
    if inject.RECORD in model.__dict__ and model.__dict__.get("peft_config") is not inject.record(model).configs:
        raise ConfigError("a PeftModel holds this model's adapters; use the add_adapter(name, config) of that one")
    # What was read from a file, or comes with its tensors, is about to be filled.
    fresh = state_dict is None and not peft_config.inference_mode and peft_config.peft_version is None
    only = None if state_dict is None else _of_tensors(model, peft_config, state_dict)
    put_on(model, peft_config, adapter_name, fresh=fresh, drawn=not low_cpu_mem_usage, autocast_adapter_dtype=False, only=only)
    inject.activate(model, [adapter_name], trainable=not peft_config.inference_mode)
    model.__dict__["peft_config"] = inject.record(model).configs
    return model


def _forget_what_was_unloaded(model: nn.Module) -> None:
    """Clear the record of a model whose layers other code has put back, or whose adapters it took off one by one, as diffusers does."""
    if not inject.record(model).plans or not any(isinstance(m, Swapped) for m in model.modules()):
        inject.detach(model)


def _of_tensors(model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor]) -> PeftConfig:
    """The configuration with the layers as targets that an adapter's tensors belong to."""
    modules = dict(base_modules(model))
    paths: dict[str, None] = {}
    for key in tensors:
        parts = key.removeprefix(PREFIX).split(".")
        owner = next((p for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in modules), None)
        if owner is not None and not matches(config.modules_to_save, owner):
            paths[owner] = None
    if not paths:
        raise ConfigError(
            f"state_dict has no tensor of a layer of this {type(model).__name__}; its first keys are {', '.join(list(tensors)[:3])}"
        )
    exactly = "|".join(re.escape(p) for p in paths)
    return dataclasses.replace(config, target_modules=exactly, exclude_modules=None, layers_to_transform=None, layers_pattern=None)


def check_name(name: str, attached: Mapping[str, PeftConfig]) -> None:
    """Refuse a name that an adapter cannot have, or that one has already."""
    if not re.fullmatch(_ADAPTER_NAME, name) or name in dir(nn.ModuleDict):
        raise ConfigError(
            f"adapter name {name!r}: use letters, digits, _ and -, and not the name of a dictionary's method; it becomes a folder's name"
        )
    if name in attached:
        raise ConfigError(f"an adapter called {name!r} is attached already; delete_adapter({name!r}) first, or choose another name")


def _name_of(model: nn.Module) -> str | None:
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None
