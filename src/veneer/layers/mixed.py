"""What modules with adapters do in a batch in which each sample has its own adapter.

A layer that is called is the engine's (see `engine.mixed`). A module that reads its weights itself, and a module that is trained whole, runs once for
each adapter on that adapter's samples; inside such a run every other module sees one adapter's samples only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine import BASE, Assignment, evaluate_mixed
from ..errors import StateError
from . import switches
from .per_sample import Arguments, outputs_together

if TYPE_CHECKING:
    from .adapted import AdaptedModule
    from .adapter import Share
    from .swap import Swapped


def running(module: Swapped) -> tuple[str, ...]:
    """The adapters that run now: the active ones, or the one that the samples at hand go through."""
    batch = None if module.veneer_record is None else module.veneer_record.batches.current()
    if batch is None:
        return module.veneer_active
    return () if batch.single in (None, BASE) else (batch.single,)


def stacked(adapters: Sequence[Share]) -> Any:
    """The tensors that one equation reads for all of them, with a leading dimension; constants that they share are left as they are."""
    each = [vars(a.values()) for a in adapters]
    own = {s.name for s in adapters[0].specs}
    return SimpleNamespace(**{n: torch.stack([v[n] for v in each]) if n in own else t for n, t in each[0].items()})


def where(module: Swapped) -> str:
    """A module's path in the model, for messages."""
    return module.veneer_path or type(module).__name__


def refuse_other_states(module: Swapped) -> None:
    """Raise StateError where adapter_names cannot be followed: adapters are merged, or switched off."""
    if module.__dict__.get("veneer_merged"):
        raise StateError(f"{where(module)}: adapters are merged into the weight, which all samples share; call unmerge_adapter() first")
    if switches.disable_adapters(module):
        raise StateError(f"{where(module)}: its adapters are switched off; leave disable_adapter() first, or do without adapter_names")


def mixed_layer(layer: AdaptedModule, batch: Assignment, x: Tensor) -> Tensor:
    """The forward of a layer that is called."""
    refuse_other_states(layer)
    return evaluate_mixed(layer, x, batch, lambda: where(layer))


def by_adapter(module: Swapped, run: Callable[..., Any], batch: Assignment, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A module's forward, once for each adapter on its own samples."""
    refuse_other_states(module)
    groups = batch.groups(lambda name: True)
    given = Arguments(module, batch, args, kwargs, lambda: where(module))
    found = []
    for name, samples in groups.items():
        own, named = given.of(samples)
        with module.veneer_record.batches.running(batch.part(name, samples)):
            found.append((samples, run(*own, **named)))
    return outputs_together(found, batch, given, lambda: where(module))


def check_reader(module: Swapped) -> None:
    """Raise StateError where something reads an adapted weight while samples of several adapters are at hand."""
    batch = module.veneer_record.batches.current()
    if batch is None:
        return
    refuse_other_states(module)
    if batch.single is None:
        raise StateError(
            f"{where(module)}: its weight is read outside its own forward, where the samples of this batch cannot be told apart; call the model for each "
            "adapter by itself"
        )
