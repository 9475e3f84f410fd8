"""Attach, activate and detach adapters on a model in place.

`attach` follows a plan and cannot fail half way. What has to be remembered to undo it (which parameters required grad, the first values of
trained biases) is kept in one record on the model, so that `detach` gives back the untouched model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import PeftConfig
from .engine import sources
from .labels import label_tensors
from .layers import AdaptedModule, Adapter, Frozen, Shared, adapt, restore, save_module
from .layers.fused import hold_open, release
from .layers.storages import hold_packing, release_packing
from .layers.switches import enable_adapters
from .layers.views import lend_tensors
from .operators import Adapted
from .planning import Plan
from .reach import turn
from .records import RECORD, Record, adapted_modules, adapter_of, check_names, holders, holders_of, reaches, record, saved_modules
from .shelving import bring, lay_down

__all__ = [
    "RECORD",
    "Record",
    "activate",
    "adapted_modules",
    "adapter_of",
    "attach",
    "check_names",
    "detach",
    "disable",
    "enable",
    "enlist",
    "holders",
    "record",
    "remove",
    "saved_modules",
    "unreached",
]


def attach(model: nn.Module, plan: Plan, config: PeftConfig, name: str, *, fresh: bool = True, autocast_adapter_dtype: bool = True) -> None:
    """Attach one adapter, inactive, and freeze the rest of the model.

    Args:
        fresh: draw its first values; False when a file is read into it next.
        autocast_adapter_dtype: keep the adapter's parameters in float32 where the layer's own are in half precision.
    """
    if RECORD not in model.__dict__:
        model.__dict__[RECORD] = Record({n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)})
        model.__dict__[RECORD].hooks = sources.watch(model)
        model.requires_grad_(False)
    note = record(model)
    constants = config.shared([s.form for s in plan.sites])
    shared = Shared(constants) if constants else None
    for site in plan.sites:
        module = adapt(model.get_submodule(site.module), site.kind, site.path)
        own, dtype = module._parameters[site.kind.tensor], site.kind.storage(module).dtype(module, site.kind.tensor)
        assert own is not None
        dtype = torch.float32 if torch.finfo(dtype).bits < 32 and autocast_adapter_dtype else dtype
        if shared is not None and not note.shared.get(name):
            note.shared[name] = shared.to(device=own.device, dtype=dtype)
        adapter = Adapter(site.method, site.form, own, dtype, shared, drawn=fresh)
        adapter.place = (site.path, site.module, site.key)
        if not own.is_meta:
            with torch.no_grad():
                site.method.finish(Adapted(Frozen(site.kind, module)), adapter.values())
        if name not in module.veneer:
            module.veneer[name] = nn.ModuleDict()
        module.veneer[name].add_module(site.kind.slot, adapter)
        module.veneer_record, module.veneer_path = note, site.module
        lend_tensors(AdaptedModule, module)
        if not module.training:
            module.veneer.eval()
    for path in plan.saved:
        saved = save_module(model.get_submodule(path), name)
        saved.veneer[name].requires_grad_(False)
        saved.veneer_record, saved.veneer_path = note, path
    note.first_biases |= {b: model.get_parameter(b).detach().clone() for b in plan.biases}
    note.fused |= hold_open(model)
    note.packing |= hold_packing(model)
    enlist(model, plan, config, name)


def enlist(model: nn.Module, plan: Plan, config: PeftConfig, name: str) -> None:
    """Note that an adapter is there."""
    note = record(model)
    note.plans[name], note.configs[name] = plan, config
    note.shelf.touch(name)
    base = note.naming.of_base(model)
    if base is not None and label_tensors(model, plan.saved, base):
        note.naming.give(model, name, base.names)
    schedule = config.schedule()
    if schedule is not None:
        note.schedules[name] = (config, schedule)


def activate(model: nn.Module, names: Sequence[str], *, trainable: bool | None = None) -> None:
    """Make exactly these adapters active; inactive ones do not require grad.

    Args:
        trainable: whether they train; None keeps what each was.

    Raises:
        StateError: a name that is not attached, or more of them than the budget allows to be; nothing is changed.
        AdapterFileError: a name that waits on disk, where it was changed; nothing is changed.
    """
    note = check_names(model, names)
    leaving = bring(model, names)
    if trainable is not None:
        note.trainable = (note.trainable | set(names)) if trainable else (note.trainable - set(names))
    _switch(model, names)
    lay_down(model, leaving)


def _switch(model: nn.Module, names: Sequence[str]) -> None:
    """Make exactly these adapters, which are attached, active."""
    note = record(model)
    changed = note.turned | set(names)
    note.active, note.turned = tuple(names), set(names)
    turn(reaches(model, changed), note.active, note.trainable)
    training = {b for n in names if n in note.trainable for b in note.plans[n].biases}
    for bias in note.first_biases:
        model.get_parameter(bias).requires_grad_(bias in training)
    _show_labels(model)


def _show_labels(model: nn.Module) -> None:
    """Let the configuration say the labels of the head that runs: of several active adapters, the last one's that has a head."""
    note = record(model)
    note.naming.show(model, next((n for n in reversed(note.active) if n in note.naming.said), None))


def disable(model: nn.Module) -> dict[str, Tensor]:
    """Let the model run as its base; returns the trained biases for `enable`."""
    note = record(model)
    for holder in holders_of(model, note.turned):
        enable_adapters(holder, False)
    note.naming.show(model, None)
    trained = {b: model.get_parameter(b).detach().clone() for b in note.first_biases}
    _set_biases(model, note.first_biases)
    return trained


def enable(model: nn.Module, trained: dict[str, Tensor]) -> None:
    """Undo `disable`."""
    _set_biases(model, trained)
    for holder in holders_of(model, record(model).turned):
        enable_adapters(holder, True)
    _show_labels(model)


def remove(model: nn.Module, name: str) -> None:
    """Take one adapter off the model."""
    note = record(model)
    if name in note.active:
        _switch(model, [n for n in note.active if n != name])
    plan = note.plans[name]
    for holder in () if name in note.shelf else holders_of(model, [name]):
        if name in holder.veneer:
            del holder.veneer[name]
    note.forget(name)
    _set_biases(model, {b: note.first_biases[b] for b in plan.biases})
    for bias in plan.biases:
        del note.first_biases[bias]


def detach(model: nn.Module) -> nn.Module:
    """Take every adapter off and give back the untouched model."""
    note = record(model)
    _set_biases(model, note.first_biases)
    note.naming.show(model, None)
    for holder in list(holders(model)):
        restore(holder)
    release(model, note.fused)
    release_packing(model, note.packing)
    for hook in note.hooks:
        hook.remove()
    for name, p in model.named_parameters():
        p.requires_grad_(note.required_grad[name])
    del model.__dict__[RECORD]
    return model


def unreached(model: nn.Module) -> list[str]:
    """Paths of adapted layers whose forward has never run."""
    return [path for path, module in adapted_modules(model) if not module.veneer_reached]


@torch.no_grad()
def _set_biases(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)
