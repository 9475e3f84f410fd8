"""Attach, activate and detach adapters on a model in place.

`attach` follows a plan and cannot fail half way. What has to be remembered to undo it (which parameters required grad, the first values of
trained biases) is kept in one record on the model, so that `detach` gives back the untouched model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import PeftConfig
from .engine import sources
from .errors import StateError, suggest
from .labels import Labels, label_tensors
from .layers import AdaptedModule, Adapter, Frozen, SavedModule, Shared, Swapped, adapt, restore, save_module
from .layers.fused import hold_open, release
from .layers.switches import enable_adapters, turn
from .layers.views import lend_tensors
from .methods.base import Schedule
from .operators import Adapted
from .planning import Plan, Site

RECORD = "_veneer_record"


@dataclass
class Record:
    """What is attached to a model, and how the model was before."""

    required_grad: dict[str, bool]
    plans: dict[str, Plan] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    turned: set[str] = field(default_factory=set)
    """The adapters that some module may have switched on; the active ones, and more where other code turned modules one by one."""
    trainable: set[str] = field(default_factory=set)
    first_biases: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    shared: dict[str, Shared] = field(default_factory=dict)
    schedules: dict[str, tuple[PeftConfig, Schedule]] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    naming: Labels = field(default_factory=Labels)

    @property
    def labels(self) -> dict[str, dict[int, str]]:
        """The label names of each adapter that has a head of its own, by output."""
        return {name: said.names for name, said in self.naming.said.items() if name is not None}

    def check(self, names: Sequence[str]) -> None:
        """Raise StateError for a name that is not attached."""
        for name in names:
            if name not in self.plans:
                raise StateError(
                    f"no adapter is called {name!r}; attached are {', '.join(self.plans) or 'none'}.{suggest(name, self.plans)}"
                )

    def forget(self, name: str) -> None:
        """Note that an adapter is no longer attached."""
        kept: dict[Any, Any]
        for kept in (self.plans, self.shared, self.schedules, self.configs, self.naming.said):
            kept.pop(name, None)
        self.trainable.discard(name)
        self.turned.discard(name)
        self.active = tuple(n for n in self.active if n != name)


def record(model: nn.Module) -> Record:
    """The record of a model with adapters.

    Raises:
        StateError: no adapter is attached.
    """
    if RECORD not in model.__dict__:
        raise StateError(f"this {type(model).__name__} has no adapter attached; use get_peft_model or PeftModel.from_pretrained")
    return model.__dict__[RECORD]


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Every module with adapted weights, by path."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, AdaptedModule))


def adapter_of(model: nn.Module, site: Site, name: str) -> Adapter:
    """The adapter that sits at a site under a name."""
    module = model.get_submodule(site.module)
    assert isinstance(module, AdaptedModule)
    found = module.veneer[name]._modules[site.kind.slot]
    assert isinstance(found, Adapter)
    return found


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """Every module with whole copies, by path."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, SavedModule))


def holders(model: nn.Module) -> Iterator[Swapped]:
    """Every module that holds adapters, of either sort."""
    return (m for m in model.modules() if isinstance(m, Swapped))


def holders_of(model: nn.Module, names: Iterable[str]) -> list[Swapped]:
    """The modules that hold these adapters, found by their paths: their number is the layers', however many adapters are attached."""
    plans = record(model).plans
    paths = {path: None for n in names if n in plans for path in plans[n].holders}
    found = (_at(model, path) for path in paths)
    return [m for m in found if isinstance(m, Swapped)]


def _at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, past the look-ups of nn.Module, which cost more than switching may; None where other code took it away."""
    found: nn.Module | None = model
    for part in path.split(".") if path else ():
        found = None if found is None else found._modules.get(part)
    return found


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
        own = site.kind.matrix(module)
        dtype = torch.float32 if torch.finfo(own.dtype).bits < 32 and autocast_adapter_dtype else own.dtype
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
        module.veneer_record = note
        lend_tensors(AdaptedModule, module)
        if not module.training:
            module.veneer.eval()
    for path in plan.saved:
        saved = save_module(model.get_submodule(path), name)
        saved.veneer[name].requires_grad_(False)
        saved.veneer_record = note
    note.first_biases |= {b: model.get_parameter(b).detach().clone() for b in plan.biases}
    note.fused |= hold_open(model)
    note.plans[name], note.configs[name] = plan, config
    base = note.naming.of_base(model)
    if base is not None and label_tensors(model, plan.saved, base):
        note.naming.give(model, name, base.names)
    schedule = config.schedule()
    if schedule is not None:
        note.schedules[name] = (config, schedule)


def check_names(model: nn.Module, names: Sequence[str]) -> Record:
    """The model's record, in which all of these adapters are.

    Raises:
        StateError: a name that is not attached.
    """
    note = record(model)
    note.check(names)
    return note


def activate(model: nn.Module, names: Sequence[str], *, trainable: bool | None = None) -> None:
    """Make exactly these adapters active; inactive ones do not require grad.

    Args:
        trainable: whether they train; None keeps what each was.

    Raises:
        StateError: a name that is not attached; nothing is changed.
    """
    note = check_names(model, names)
    if trainable is not None:
        note.trainable = (note.trainable | set(names)) if trainable else (note.trainable - set(names))
    changed = note.turned | set(names)
    note.active, note.turned = tuple(names), set(names)
    for holder in holders_of(model, changed):
        turn(holder, note.active, note.trainable, changed)
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
    activate(model, [n for n in note.active if n != name])
    plan = note.plans[name]
    for holder in holders_of(model, [name]):
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
