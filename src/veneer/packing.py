"""Adapters that wait: all the tensors of one lie end to end, one pack for each number type, and what adapters of equal configuration have in common is kept once.

An attached adapter is two modules and their dictionaries for each weight. A packed one is a tensor and a
dictionary entry. It is looked up at a layer like any other: its tensors are views.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .layers import AdaptedModule, Adapter, SavedModule, Share, Shared
from .methods.base import Parameter
from .planning import Plan, Site

Find = Callable[[str], nn.Module]
"""The module at a path."""


@dataclass(frozen=True)
class Span:
    """Where a tensor lies.

    Args:
        pack: in which of an adapter's packs.
        start: from which number on.
        shape: of the tensor.
    """

    pack: int
    start: int
    shape: torch.Size


@dataclass(eq=False, repr=False)
class Place:
    """What the adapters of a pattern have in common at one weight.

    Args:
        site: the weight, and the method with its numbers.
        specs: the method's tensors.
        spans: where they lie, by name.
    """

    site: Site
    specs: list[Parameter]
    spans: dict[str, Span]


@dataclass(eq=False, repr=False)
class Pattern:
    """What adapters of equal configuration have in common.

    Args:
        plan: what they adapt.
        shared: constants that all their layers share.
        places: by path of the module and slot.
        copies: of modules kept whole, by path: the module without numbers, and where its tensors lie.
        packs: the number type and the length of each pack.
        names: the tensors of the adapter file by their names there.
        beside: the tensors that no adapter file holds.
    """

    plan: Plan
    shared: Shared | None
    places: dict[str, dict[str, Place]]
    copies: dict[str, tuple[nn.Module, dict[str, Span]]]
    packs: tuple[tuple[torch.dtype, int], ...]
    names: dict[str, Span]
    beside: dict[str, Span]

    def alike(self, other: Pattern) -> bool:
        """Whether adapters of the two are packed alike, and mean the same."""

        def facts(p: Pattern) -> Any:
            sites = [(s.path, s.module, s.key, s.kind.slot, s.form, s.method) for s in p.plan.sites]
            return sites, p.packs, p.names, p.beside, {path: str(made) for path, (made, _) in p.copies.items()}

        return facts(self) == facts(other) and _equal(self.shared, other.shared)


def _equal(a: Shared | None, b: Shared | None) -> bool:
    if a is None or b is None:
        return a is b
    one, other = dict(a.named_buffers()), dict(b.named_buffers())
    return a is b or (one.keys() == other.keys() and all(t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()))


class PackedShare(Share):
    """What a packed adapter has at one weight; its tensors are views of its packs."""

    def __init__(self, place: Place, weight: float, shared: Shared | None, tensors: Mapping[str, Tensor]) -> None:
        site = place.site
        self.method = site.method.weighted(weight)
        self.form, self.specs, self.shared, self.weight = site.form, place.specs, shared, weight
        self.place = (site.path, site.module, site.key)
        self.__dict__.update(tensors)


@dataclass(eq=False, repr=False)
class Packed:
    """One packed adapter.

    Args:
        pattern: what it has in common with others.
        packs: its numbers; empty while they are on disk.
        weights: what its scales were multiplied with, by path of the module and slot, where that is not 1.
        trained: parameters that somebody else, such as an optimiser, still holds, by path of the module and name: they come back as the same objects.
    """

    pattern: Pattern
    packs: list[Tensor]
    weights: dict[tuple[str, str], float] = field(default_factory=dict)
    trained: dict[tuple[str, str], weakref.ref[nn.Parameter]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"trained": {}}

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(n * dtype.itemsize for dtype, n in self.pattern.packs)

    def tensor(self, span: Span, device: torch.device | None = None) -> Tensor:
        """A view of one tensor, on a device that all of its pack moves to if it must."""
        pack = self.packs[span.pack]
        if device is not None and pack.device != device:
            pack = self.packs[span.pack] = pack.to(device)
        return pack[span.start : span.start + span.shape.numel()].view(span.shape)

    def at(self, module: AdaptedModule) -> dict[str, Share]:
        """Its share of a module, by slot; empty where it has none."""
        places = self.pattern.places.get(module.veneer_path)
        if not places:
            return {}
        device = _device(module)
        return {slot: self._share(module.veneer_path, slot, place, device) for slot, place in places.items()}

    def _share(self, path: str, slot: str, place: Place, device: torch.device) -> PackedShare:
        tensors = {name: self.tensor(span, device) for name, span in place.spans.items()}
        return PackedShare(place, self.weights.get((path, slot), 1.0), self.pattern.shared, tensors)

    def copy_of(self, module: SavedModule) -> nn.Module | None:
        """Its copy of a module, made of views; None where it has none."""
        return self._copy(module, lambda t: t)

    def _copy(self, module: SavedModule, keep: Callable[[Tensor], Tensor]) -> nn.Module | None:
        if module.veneer_path not in self.pattern.copies:
            return None
        empty, spans = self.pattern.copies[module.veneer_path]
        made = copy.deepcopy(empty).train(module.training)
        device = _device(module)
        done: dict[Span, Tensor] = {}
        for name, span in spans.items():
            owner, _, last = name.rpartition(".")
            inside: Any = made.get_submodule(owner)
            value = done.get(span)
            if value is None:
                value = keep(self.tensor(span, device))
            if last in inside._buffers:
                inside._buffers[last] = value
                done[span] = value
                continue
            # Two names of one parameter stay one parameter.
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            inside._parameters[last] = parameter
            done[span] = parameter
        return made

    def put_back(self, name: str, find: Find) -> None:
        """Attach it again, inactive, bit for bit as it was."""
        for path, places in self.pattern.places.items():
            module = find(path)
            assert isinstance(module, AdaptedModule)
            held = nn.ModuleDict()
            for slot, place in places.items():
                share = self._share(path, slot, place, _device(module))
                tensors = {n: getattr(share, n).clone() for n in place.spans}
                adapter = Adapter.of(place.site.method, place.site.form, self.pattern.shared, place.specs, tensors)
                if share.weight != 1:
                    adapter.weigh(share.weight)
                adapter.place = share.place
                held.add_module(slot, adapter)
            module.veneer[name] = held.train(module.training)
        for path in self.pattern.copies:
            saved = find(path)
            assert isinstance(saved, SavedModule)
            made = self._copy(saved, Tensor.clone)
            assert made is not None
            saved.veneer[name] = made
        for (path, n), ref in self.trained.items():
            old = ref()
            if old is not None:
                owner, _, last = n.rpartition(".")
                inside = find(path).get_submodule(f"veneer.{name}.{owner}".rstrip("."))
                old.data = inside.get_parameter(last).data
                old.requires_grad = False
                inside._parameters[last] = old

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors of the adapter file by their names there."""
        return {key: self.tensor(span) for key, span in self.pattern.names.items()}

    def beside(self) -> dict[str, Tensor]:
        """The tensors that no adapter file holds, by name."""
        return {key: self.tensor(span) for key, span in self.pattern.beside.items()}


def _device(module: nn.Module) -> torch.device:
    """Where a module's own tensors are."""
    for kept in (module._parameters, module._buffers):
        for t in kept.values():
            if t is not None:
                return t.device
    return next((t.device for t in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def of_file(pattern: Pattern, tensors: Mapping[str, Tensor], devices: list[torch.device]) -> Packed:
    """A packed adapter of a file's tensors, which fit the pattern."""
    by_pack: list[list[Tensor]] = [[] for _ in pattern.packs]
    for key, span in sorted(pattern.names.items(), key=lambda item: (item[1].pack, item[1].start)):
        by_pack[span.pack].append(tensors[key].reshape(-1))
    made = [
        torch.cat([t.to(dtype) for t in pack]).to(device) for (dtype, _), pack, device in zip(pattern.packs, by_pack, devices, strict=True)
    ]
    return Packed(pattern, made)
