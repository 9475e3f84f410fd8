"""An adapter's tensors by their names in the file, taken from a model and put into it.

`PeftModel.save_pretrained` and `from_pretrained` are strict. `set_peft_model_state_dict` is for code that looks at what it returns: it copies what fits, and
says what was missing or unexpected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import files, inject
from .config import PREFIX
from .disk import locate
from .errors import AdapterFileError, ConfigError
from .layers.swap import ADAPTERS
from .shelving import keep_to_budget, unpack


class LoadResult(NamedTuple):
    """What loading left undone, by name in the model or in the file."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]


def base_of(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, or the model itself, adapted in place."""
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return base


def gathered(tensors: Mapping[str, Tensor], model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same entries with their values from `state_dict`, as gathered from a sharded model, by the names in this model."""
    own = {id(t): key for key, t in model.state_dict(keep_vars=True).items()}
    return {key: state_dict[own[id(t)]] if id(t) in own else t for key, t in tensors.items()}


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """One adapter's tensors by their names in the file; without `base_model.model.` for a model that has no wrapper.

    Args:
        model: a PeftModel, or a model with an injected adapter.
        state_dict: take the values from here, by their names in the model.
        unwrap_compiled: look inside what `torch.compile` returned.
        save_embedding_layers: True is refused: the base's own weights are kept with an adapter by naming them in `modules_to_save`.

    >>> import torch
    >>> from veneer import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> list(get_peft_model_state_dict(model))
    ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
    """
    if save_embedding_layers is True:
        raise ConfigError(
            "save_embedding_layers=True: Veneer keeps no frozen weights with an adapter; name the embeddings in modules_to_save"
        )
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    base = base_of(model)
    note = inject.record(base)
    inject.check_names(base, [adapter_name])
    found = files.entries(base, adapter_name, shared=note.configs[adapter_name].writes_shared)
    if state_dict is not None:
        found = gathered(found, model, state_dict)
    return {key if base is not model else key.removeprefix(PREFIX): t.detach() for key, t in found.items()}


@torch.no_grad()
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy tensors into an attached adapter, as far as they fit; the result says what was missing and what was not expected.

    Args:
        peft_model_state_dict: by the names in the file, with or without `base_model.model.` and the adapter's name.
        ignore_mismatched_sizes: leave out tensors of other shapes, and list them in the result.
        low_cpu_mem_usage: put the given tensors themselves into the model instead of copying them, where their type and device are the same.

    Raises:
        AdapterFileError: a tensor of another shape, or with NaN or infinite numbers; nothing was copied.
    """
    base = base_of(model)
    inject.check_names(base, [adapter_name])
    unpack(base, [adapter_name])
    expected = files.entries(base, adapter_name, shared=inject.record(base).configs[adapter_name].writes_shared)
    given = {_file_key(key, adapter_name, expected): t for key, t in peft_model_state_dict.items()}
    fitting = {k: t for k, t in given.items() if k in expected}
    mismatched = [k for k, t in fitting.items() if t.shape != expected[k].shape]
    if ignore_mismatched_sizes:
        fitting = {k: t for k, t in fitting.items() if k not in mismatched}
    files.check_tensors(fitting, {k: expected[k] for k in fitting}, "state_dict")
    for key, value in fitting.items():
        target = expected[key]
        if low_cpu_mem_usage and (value.dtype, value.device) == (target.dtype, target.device):
            target.data = value.detach()
        else:
            target.copy_(value)
    keep_to_budget(base)
    missing = [_named(k, adapter_name, base is not model) for k in expected if k not in given]
    return LoadResult(missing, [k for k in given if k not in expected], mismatched if ignore_mismatched_sizes else [])


def _file_key(key: str, name: str, expected: Mapping[str, Tensor]) -> str:
    """The name in the file of a tensor that is given with less or more around it."""
    whole = key if key.startswith("base_model.") else PREFIX + key
    plain = re.sub(rf"\.{re.escape(name)}(?=\.|$)", "", whole)
    return next((k for k in (whole, plain, plain.removesuffix(".weight")) if k in expected), key)


def _named(key: str, name: str, wrapped: bool) -> str:
    """A tensor's name in a model of the format's usual library, where the adapter's name stands before the last part that says what it is."""
    key = key if wrapped else key.removeprefix(PREFIX)
    owner, _, last = key.rpartition(".")
    return f"{owner}.{name}.{last}" if last in ("weight", "bias") else f"{key}.{name}"


def load_peft_weights(
    model_id: str | os.PathLike[str], device: str | torch.device | None = None, key_mapping: Mapping[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter's directory or repository.

    Args:
        device: where they go; the CPU if None.
        key_mapping: {regular expression: replacement} for names that were given by another release; the first one that matches a name is used.
        hub: as for `PeftModel.from_pretrained`.

    Raises:
        AdapterFileError: no adapter there, or a pickled one.
    """
    found = {k: t.to(device or "cpu") for k, t in files.read_tensors(locate(model_id, **hub)).items()}
    return renamed(found, key_mapping)


def renamed(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The tensors under the names that `key_mapping` gives them."""
    found = {}
    for key, value in tensors.items():
        pattern = next((p for p in key_mapping or {} if re.search(p, key)), None)
        new = key if pattern is None or key_mapping is None else re.sub(pattern, key_mapping[pattern], key, count=1)
        if new in found:
            raise AdapterFileError(f"key_mapping gives two tensors the name {new}")
        found[new] = value
    return found


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The frozen model's state dict by its own names, without adapters.

    >>> import torch
    >>> from veneer import LoraConfig, get_peft_model
    >>> list(get_base_model_state_dict(get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))))
    ['0.weight', '0.bias']
    """
    return {k: t for k, t in base_of(model).state_dict().items() if f".{ADAPTERS}." not in f".{k}"}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Load the frozen model's own weights, by their own names.

    Args:
        strict: refuse missing and unexpected names.

    Raises:
        AdapterFileError: they do not fit; nothing was loaded.
    """
    base = base_of(model)
    own = get_base_model_state_dict(model)
    missing, unexpected = [k for k in own if k not in state_dict], [k for k in state_dict if k not in own]
    wrong = [k for k in own if k in state_dict and state_dict[k].shape != own[k].shape]
    if wrong or (strict and (missing or unexpected)):
        kind, names = ("misshapen", wrong) if wrong else ("missing", missing) if missing else ("unexpected", unexpected)
        raise AdapterFileError(f"the state dict is not this {type(base).__name__}'s: {len(names)} {kind} tensors, such as {names[0]}")
    base.load_state_dict({k: t for k, t in state_dict.items() if k in own}, strict=False)
    return LoadResult(missing, unexpected, [])
