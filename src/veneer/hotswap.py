"""Put another adapter's numbers into the tensors of an attached one, so that a compiled model goes on as it was compiled.

A compiled graph holds the adapter's tensors by their storage, and its scale s as a constant. So nothing is replaced: values are copied into the tensors that are there, a smaller
rank is filled up with numbers that change nothing, and s is put into a tensor that the change is proportional to (see `methods.transfer`). The configuration stays that of the
attached adapter, which is what its tensors now mean: saved, it gives the same outputs.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import files, inject
from .config import PREFIX, PeftConfig
from .disk import locate
from .errors import ConfigError, StateError, TargetError, VeneerWarning
from .inject import record, saved_modules
from .layers import AdaptedModule, Adapter, Frozen
from .layers.swap import unadapted
from .methods.base import Parameter
from .methods.transfer import values_for
from .operators import Adapted
from .planning import Plan, Site, plan
from .records import attached_at
from .shelving import unpack
from .state_dicts import base_of, renamed
from .translation import fitted, todays

_Write = tuple[Tensor, Tensor]
"""A tensor of the model, and what goes into it."""


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Replace an attached adapter's numbers by those of a file, in place; a compiled model is not compiled again.

    Any method, rank up to the attached one's where the equation allows it, any scale; layers that the file leaves out become the base's again. The
    configuration, and training's dropout, stay those of the attached adapter; what a schedule has learnt starts anew.

    Args:
        model: a PeftModel, a model with injected adapters, or what `torch.compile` made of one.
        model_name_or_path: an adapter's directory, or its repository on the hub.
        adapter_name: which of the attached adapters.
        torch_device: where the new tensors are prepared; the CPU if None.
        kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, `key_mapping`.

    Raises:
        StateError: no such adapter, it is merged, or its equation cannot take the new numbers.
        AdapterFileError: tensors that do not fit; the model is as it was.

    Example:

        model = PeftModel.from_pretrained(base, "first")
        prepare_model_for_compiled_hotswap(model, target_rank=16)
        compiled = torch.compile(model)
        hotswap_adapter(compiled, "second", "default")
    """
    base = _inside(model)
    inject.check_names(base, [adapter_name])
    key_mapping = kwargs.pop("key_mapping", None)
    directory = locate(model_name_or_path, **kwargs)
    unpack(base, [adapter_name])
    tensors = {k: t.to(torch_device or "cpu") for k, t in files.read_tensors(directory).items()}
    swap_in(base, adapter_name, PeftConfig.read(directory), renamed(tensors, key_mapping), directory)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Give the attached adapters the largest rank that will be swapped in, with unchanged outputs; call it before `torch.compile`.

    The adapters' tensors are new ones, so make optimisers afterwards. Scales need no preparation.

    Args:
        model: with adapters attached.
        target_rank: the rank; None leaves the ranks as they are.
        config: further configurations, of adapters yet to be loaded, whose rank is set as well.
        check_compiled: what to do where the model is compiled already.

    Raises:
        StateError: the model is compiled, or nothing is attached.
        ConfigError: a method whose rank cannot grow, or a rank that is larger already; the model is as it was.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(f"check_compiled: 'error', 'warn' or 'ignore', got {check_compiled!r}")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        said = (
            "the model is compiled already, and other shapes compile it again; call prepare_model_for_compiled_hotswap before torch.compile"
        )
        if check_compiled == "error":
            raise StateError(said)
        if check_compiled == "warn":
            warnings.warn(said, VeneerWarning, stacklevel=2)
    base = _inside(model)
    note = record(base)
    if target_rank is None:
        return
    others = [config] if isinstance(config, PeftConfig) else list((config or {}).values())
    configs = {name: own.with_rank(target_rank) for name, own in note.configs.items() if name not in note.shelf}
    grown = [(c, c.with_rank(target_rank)) for c in others if all(c is not own for own in note.configs.values())]
    ready = {name: _refitted(base, name, new) for name, new in configs.items()}
    for name, (new_plan, adapters) in ready.items():
        note.plans[name] = new_plan
        for site, adapter in adapters:
            module = base.get_submodule(site.module)
            module.veneer[name].add_module(site.kind.slot, adapter)  # type: ignore[index, union-attr]  # adapted there
    for own, new in [*((note.configs[n], c) for n, c in configs.items()), *grown]:
        vars(own).update(vars(new))


@torch.no_grad()
def swap_in(model: nn.Module, name: str, config: PeftConfig, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Copy another adapter's tensors into an attached one's, after everything was checked; label names follow.

    Args:
        model: the base model, adapted in place.
        config: of the new adapter.
        tensors: by their names in the file.
        directory: where it lies.
    """
    note, origin = record(model), str(directory)
    config, tensors = todays(model, copy.copy(config), tensors)
    attached, new = note.plans[name], plan(model, config, fresh=False)
    _refuse_what_is_not_there(attached, new, name, origin)
    held = {key: t for path, m in saved_modules(model) if path in new.saved for key, t in _copies(m, path, name).items()}
    tensors = _checked(model, new, config, held, tensors, origin)
    _check_shared(model, name, config, new, tensors, origin)
    writes: list[_Write] = []
    sites = {(s.module, s.kind.slot): s for s in new.sites}
    for site in attached.sites:
        module = model.get_submodule(site.module)
        if getattr(module, "veneer_merged", None):
            raise StateError(f"{site.weight} is merged, so its numbers are in the weight; call unmerge_adapter() first")
        other = sites.get((site.module, site.kind.slot))
        adapter = attached_at(model, site, name)
        if other is None:
            writes += _at_rest(adapter, site, module, origin)
            continue
        if name in note.trainable and site.method.noise != other.method.noise:
            raise StateError(
                f"{origin}: {name!r} is being trained with another dropout; use set_adapter({name!r}, inference_mode=True) first"
            )
        given = {s.name: tensors[_key(other, s)] for s in other.method.all_parameters(other.form) if s.key}
        writes += _into(adapter, values_for(site.method, other.method, site.form, given, f"{origin}: {site.weight}"))
    writes += [(t, tensors[key]) for key, t in held.items()]
    writes += list(_base_values(model, attached, new, name))
    writes += [(model.get_parameter(b), tensors[_bias_key(new, b)]) for b in new.biases]
    names, base = files.label_names(model, new, tensors, directory), note.naming.of_base(model)
    if names is None and name in note.labels and base is not None:
        names = base.names  # its head is the base's again
    for target, value in writes:
        target.copy_(value)
    if names is not None:
        note.naming.give(model, name, names)


def _into(adapter: Adapter, values: Mapping[str, Tensor]) -> Iterator[_Write]:
    """The writes that put values into an adapter; what a schedule has learnt starts anew."""
    for spec in adapter.specs:
        target = getattr(adapter, spec.name)
        if spec.name in values:
            yield target, values[spec.name].to(target)
        elif spec.state:
            yield target, torch.zeros_like(target)


def _at_rest(adapter: Adapter, site: Site, module: nn.Module, origin: str) -> Iterator[_Write]:
    """The writes after which an adapter changes nothing."""
    assert isinstance(module, AdaptedModule)
    if any(s.still is None for s in adapter.specs):
        raise StateError(
            f"{origin} leaves {site.weight} out, and the attached {type(site.method).__name__} there has no numbers that change nothing; load it under a name of its own instead"
        )
    own = site.kind.matrix(module)
    first = next(adapter.parameters())
    resting = Adapter(site.method, site.form, own, first.dtype, adapter.shared, drawn=False)
    for last in (False, True):
        for spec in resting.specs:
            if spec.still is not None and (spec.key or spec.state):
                spec.still(getattr(resting, spec.name).data)
        if not last:
            site.method.finish(Adapted(Frozen(site.kind, module)), resting.values())
    return _into(adapter, resting.by_name())


def _refitted(model: nn.Module, name: str, config: PeftConfig) -> tuple[Plan, list[tuple[Site, Adapter]]]:
    """The plan and the adapters that say under another configuration what an attached adapter says now."""
    note = record(model)
    new = plan(model, config, fresh=False)
    sites = {(s.module, s.kind.slot): s for s in new.sites}
    found = []
    for site in note.plans[name].sites:
        to, old = sites[site.module, site.kind.slot], attached_at(model, site, name)
        try:
            values = values_for(to.method, site.method, site.form, old.by_name(), f"{name}: {site.weight}")
        except StateError as e:
            raise ConfigError(f"the rank of {name!r} cannot be made {getattr(to.method, 'rank', None)}: {e}") from None
        first = next(old.parameters())
        adapter = Adapter(to.method, site.form, first, first.dtype, old.shared, drawn=False)
        adapter.place = old.place
        adapter.weigh(old.weight)
        for target, value in _into(adapter, values):
            target.data.copy_(value)
        adapter.requires_grad_(first.requires_grad).train(old.training)
        found.append((to, adapter))
    return replace(note.plans[name], sites=[s for s, _ in found]), found


def _refuse_what_is_not_there(attached: Plan, new: Plan, name: str, origin: str) -> None:
    there = {(s.module, s.kind.slot) for s in attached.sites}
    more = [s.weight for s in new.sites if (s.module, s.kind.slot) not in there]
    more += [p for p in new.saved if p not in attached.saved]
    more += [b for b in new.biases if b not in attached.biases]
    if more:
        raise TargetError(
            f"{origin} has numbers for {more[0]}{f' and {len(more) - 1} more' if len(more) > 1 else ''}, which the attached adapter {name!r} does not reach; "
            "load it under a name of its own, or attach the adapter with the most layers first"
        )


def _copies(module: Any, path: str, name: str) -> dict[str, Tensor]:
    return {f"{PREFIX}{path}.{key}": t for key, t in module.veneer[name].state_dict(keep_vars=True).items()}


def _base_values(model: nn.Module, attached: Plan, new: Plan, name: str) -> Iterator[_Write]:
    """The writes that give modules and biases which the new adapter leaves alone the base's own values."""
    for path, module in saved_modules(model):
        if path in attached.saved and path not in new.saved:
            own = unadapted(module).state_dict()
            yield from ((t, own[key]) for key, t in module.veneer[name].state_dict(keep_vars=True).items())
    first = record(model).first_biases
    yield from ((model.get_parameter(b), first[b]) for b in attached.biases if b not in new.biases)


def _checked(
    model: nn.Module, new: Plan, config: PeftConfig, held: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """The file's tensors by the names that the new adapter's plan expects; all are there, and of its shapes."""
    expected = {
        _key(site, s): torch.empty(s.stored or s.shape, device="meta")
        for site in new.sites
        for s in site.method.all_parameters(site.form)
        if s.key
    }
    expected |= dict(held) | {_bias_key(new, b): model.get_parameter(b) for b in new.biases}
    if config.writes_shared:
        expected |= {f"base_model.{k}": t.to("meta") for k, t in config.shared([s.form for s in new.sites]).items()}
    own: Callable[[str], Tensor | None] = dict(model.named_parameters(remove_duplicate=False)).get
    found = fitted(tensors, expected, own)
    files.check_tensors(found, expected, origin)
    return found


def _check_shared(model: nn.Module, name: str, config: PeftConfig, new: Plan, tensors: Mapping[str, Tensor], origin: str) -> None:
    note = record(model)
    attached = dict(note.shared[name].named_buffers()) if name in note.shared else {}
    drawn = config.shared([s.form for s in new.sites])
    for key, t in drawn.items():
        value = tensors[f"base_model.{key}"] if config.writes_shared else t
        own = attached.get(key)
        if own is None or own.shape != value.shape or not torch.equal(own, value.to(own)):
            raise StateError(
                f"{origin} has another {key} than the attached adapter {name!r}, which all its layers share; load it under a name of its own"
            )


def _key(site: Site, spec: Parameter) -> str:
    return f"{PREFIX}{site.path}.{site.key}{spec.key}"


def _bias_key(p: Plan, bias: str) -> str:
    return PREFIX + files.through({s.path for s in p.sites} | {s.module for s in p.sites}, bias)


def _inside(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel, and inside what `torch.compile` returned."""
    base = base_of(getattr(model, "_orig_mod", model))
    return getattr(base, "_orig_mod", base)
