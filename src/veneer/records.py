"""What is attached to a model, and how the model was before: one record, which lies on the model itself, and the ways to find an adapter's modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .config import PeftConfig
from .engine import Batches
from .errors import StateError, suggest
from .labels import Labels
from .layers import AdaptedModule, Adapter, SavedModule, Share, Shared, Swapped
from .layers.swap import own_modules
from .methods.base import Schedule
from .planning import Plan, Site
from .reach import Reach, Reaches, holder_at_end, way
from .shelf import Shelf

RECORD = "_veneer_record"


@dataclass(eq=False, repr=False)
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
    packing: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Shared] = field(default_factory=dict)
    schedules: dict[str, tuple[PeftConfig, Schedule]] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    configs: dict[str, PeftConfig] = field(default_factory=dict)
    naming: Labels = field(default_factory=Labels)
    batches: Batches = field(default_factory=Batches)
    """Which adapter each sample of the running forward goes through."""
    shelf: Shelf = field(default_factory=Shelf)
    reaches: Reaches = field(default_factory=Reaches)

    @property
    def labels(self) -> dict[str, dict[int, str]]:
        """The label names of each adapter that has a head of its own, by output."""
        return {name: said.names for name, said in self.naming.said.items() if name is not None}

    def check(self, names: Sequence[str]) -> None:
        """Raise StateError for a name that is not attached."""
        for name in names:
            if name not in self.plans:
                raise StateError(f"no adapter is called {name!r}; attached are {_some(self.plans)}.{suggest(name, self.plans)}")

    def forget(self, name: str) -> None:
        """Note that an adapter is no longer attached."""
        kept: dict[Any, Any]
        for kept in (self.plans, self.shared, self.schedules, self.configs, self.naming.said):
            kept.pop(name, None)
        self.trainable.discard(name)
        self.turned.discard(name)
        self.shelf.forget(name)
        self.reaches.forget(name)
        self.active = tuple(n for n in self.active if n != name)


def _some(names: Iterable[str]) -> str:
    """The first of many names, for a message."""
    found = list(names)
    return ", ".join(found[:8]) + (f" and {len(found) - 8:,} more" if len(found) > 8 else "") if found else "none"


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
    return ((path, m) for path, m in own_modules(model) if isinstance(m, AdaptedModule))


def adapter_of(model: nn.Module, site: Site, name: str) -> Share:
    """What the adapter of a name has at a site."""
    module = holder_at(model, site.module)
    assert isinstance(module, AdaptedModule)
    return module.at(name)[site.kind.slot]


def attached_at(model: nn.Module, site: Site, name: str) -> Adapter:
    """The module that an attached adapter is at a site."""
    found = adapter_of(model, site, name)
    assert isinstance(found, Adapter)
    return found


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """Every module with whole copies, by path."""
    return ((path, m) for path, m in own_modules(model) if isinstance(m, SavedModule))


def holders(model: nn.Module) -> Iterator[Swapped]:
    """Every module that holds adapters, of either sort."""
    return (m for _, m in own_modules(model) if isinstance(m, Swapped))


def reaches(model: nn.Module, names: Iterable[str]) -> dict[str, Reach]:
    """The modules and parameters of each of these adapters, in a time that does not grow with the number of adapters attached."""
    note = record(model)
    return note.reaches.of(model, {n: note.plans[n].holders for n in names if n in note.plans})


def holders_of(model: nn.Module, names: Iterable[str]) -> list[Swapped]:
    """The modules that hold any of these adapters, each once."""
    return list(dict.fromkeys(h for found in reaches(model, names).values() for h in found.holders))


def holder_at(model: nn.Module, path: str) -> Swapped:
    """The module that holds adapters at a path.

    Raises:
        StateError: other code has put the layer back as it was.
    """
    found = holder_at_end(model, way(model, path))
    if found is None:
        raise StateError(f"{path} has lost its adapters to other code, so none can be put there; unload() and load them anew")
    return found


def check_names(model: nn.Module, names: Sequence[str]) -> Record:
    """The model's record, in which all of these adapters are.

    Raises:
        StateError: a name that is not attached.
    """
    note = record(model)
    note.check(names)
    return note
