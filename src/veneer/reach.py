"""Where an adapter's parts are in a model: found once, and found anew when the model was changed since.

Switching an adapter should not be noticed, and finding its modules by their paths takes most of the time that switching may. So the steps from the
model to each of them are kept, and looked along, not looked up: a step that leads elsewhere than it did (a layer replaced, wrapped or taken away
by other code) makes all of them be found again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .layers import Swapped
from .layers.swap import ADAPTERS, own_modules
from .layers.switches import train

Step = tuple[dict[str, Any], str, nn.Module | None]
"""The children of a module, the name of one, and that child when it was found."""


@dataclass(eq=False, repr=False)
class Reach:
    """The modules that hold one adapter, the parameters it has in them, each by the name within its module, and the steps that led there."""

    holders: list[Swapped]
    parameters: list[dict[str, nn.Parameter | None]]
    steps: list[Step]


class Reaches:
    """The reach of each adapter that was asked for, and the holders' own steps, which all of them share."""

    def __init__(self) -> None:
        self.trunk: dict[str, Swapped | None] = {}
        """The module that holds adapters at each path, or None where other code took them away."""
        self.steps: dict[tuple[int, str], Step] = {}
        """The steps of all of those paths, each once: by the children's identity, which is theirs for as long as the step is kept."""
        self.found: dict[str, Reach] = {}

    def of(self, model: nn.Module, paths: dict[str, Iterable[str]]) -> dict[str, Reach]:
        """The reach of each of these adapters.

        Args:
            paths: of each adapter, the paths of the modules that hold it, as they were when it was attached.
        """
        if not _lead(self.steps.values()):
            self.forget()
        found = {}
        for name, own in paths.items():
            known = self.found.get(name)
            if known is None or not _lead(known.steps):
                known = self.found[name] = _reach([self._holder(model, path) for path in own], name)
            found[name] = known
        return found

    def forget(self, name: str | None = None) -> None:
        """Let go of one adapter's modules, or of all."""
        if name is not None:
            self.found.pop(name, None)
            return
        for kept in (self.trunk, self.steps, self.found):
            kept.clear()

    def _holder(self, model: nn.Module, path: str) -> Swapped | None:
        if path not in self.trunk:
            steps = way(model, path)
            end = self.trunk[path] = holder_at_end(model, steps)
            if end is not None:
                steps.append((end._modules, ADAPTERS, end._modules[ADAPTERS]))
            self.steps |= {(id(children), key): (children, key, child) for children, key, child in steps}
        return self.trunk[path]

    def __reduce__(self) -> tuple[type[Reaches], tuple[()]]:
        # A copy of the model has modules of its own, and finds them itself.
        return Reaches, ()


def turn(reaches: dict[str, Reach], active: Sequence[str], trainable: set[str]) -> None:
    """Let exactly the active adapters run, of those that may have to be turned, and let those of them train that do."""
    for reach in reaches.values():
        for holder in reach.holders:
            holder.__dict__["veneer_active"] = ()
    for name in active:
        for holder in reaches[name].holders:
            holder.__dict__["veneer_active"] += (name,)
    for name, reach in reaches.items():
        train(reach.parameters, name in active and name in trainable)


def way(model: nn.Module, path: str) -> list[Step]:
    """The steps to the module that holds adapters and was at a path: along that path, or to where other code has moved it in a wrapper."""
    steps = _along(model, path)
    if holder_at_end(model, steps) is not None:
        return steps
    moved = next((now for now, m in own_modules(model) if isinstance(m, Swapped) and m.veneer_path == path), None)
    return steps if moved is None else _along(model, moved)


def holder_at_end(model: nn.Module, steps: list[Step]) -> Swapped | None:
    """The module that holds adapters at the end of some steps from the model; None where there is none."""
    end = steps[-1][2] if steps else model
    return end if isinstance(end, Swapped) else None


def _along(model: nn.Module, path: str) -> list[Step]:
    """The steps of a path, past the look-ups of nn.Module; the last one's child is None where the path ends early."""
    steps: list[Step] = []
    here: nn.Module | None = model
    for key in path.split(".") if path else ():
        if here is None:
            break
        children: dict[str, Any] = here.__dict__["_modules"]
        here = children.get(key)
        steps.append((children, key, here))
    return steps


def _reach(holders: list[Swapped | None], name: str) -> Reach:
    # A holder that has no such adapter now may get it, when a packed one is attached again: that step is kept too.
    steps: list[Step] = [(h.veneer._modules, name, h.veneer._modules.get(name)) for h in holders if h is not None]
    holding = [h for h in holders if h is not None and name in h.veneer]
    parameters = []
    for _, _, m in steps:
        if m is not None:
            parameters += [m._parameters] if m._parameters else []
            steps += [(m._modules, key, child) for key, child in m._modules.items()]
    return Reach(holding, parameters, steps)


def _lead(steps: Iterable[Step]) -> bool:
    for children, key, child in steps:  # noqa: SIM110  # a generator costs as much again as the look-up
        if children.get(key) is not child:
            return False
    return True
