"""An attached adapter, laid end to end: its tensors in packs, its modules taken away."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .config import PREFIX
from .layers import AdaptedModule, SavedModule, Shared
from .packing import Find, Packed, Pattern, Place, Span
from .planning import Plan


class _Lay:
    """Lays tensors end to end, by number type and device."""

    def __init__(self) -> None:
        self.packs: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self.ends: dict[int, int] = {}
        self.seen: dict[int, Span] = {}

    def __call__(self, t: Tensor) -> Span:
        if id(t) not in self.seen:
            self.packs.setdefault((t.dtype, t.device), []).append(t)
            pack = list(self.packs).index((t.dtype, t.device))
            self.seen[id(t)] = Span(pack, self.ends.get(pack, 0), t.shape)
            self.ends[pack] = self.ends.get(pack, 0) + t.numel()
        return self.seen[id(t)]

    def joined(self) -> list[Tensor]:
        return [torch.cat([t.detach().reshape(-1) for t in pack]) for pack in self.packs.values()]


def packed(name: str, plan: Plan, shared: Shared | None, find: Find, known: list[Pattern]) -> Packed:
    """An attached adapter, packed; it stays attached.

    Args:
        known: patterns of adapters that are packed already; a new one is added.
    """
    lay = _Lay()
    places: dict[str, dict[str, Place]] = {}
    names: dict[str, Span] = {}
    beside: dict[str, Span] = {}
    weights: dict[tuple[str, str], float] = {}
    for site in plan.sites:
        module, slot = find(site.module), site.kind.slot
        assert isinstance(module, AdaptedModule)
        adapter = module.at(name)[slot]
        spans = {s.name: lay(getattr(adapter, s.name)) for s in adapter.specs}
        places.setdefault(site.module, {})[slot] = Place(site, adapter.specs, spans)
        names |= {site.file_key(s.key): spans[s.name] for s in adapter.specs if s.key}
        beside |= {f"{site.module}.{slot}.{s.name}": spans[s.name] for s in adapter.specs if not s.key}
        if adapter.weight != 1:
            weights[site.module, slot] = adapter.weight
    copies = {}
    for path in plan.saved:
        saved = find(path)
        assert isinstance(saved, SavedModule)
        own = saved.copy_of(name)
        assert own is not None
        tensors = [*own.named_parameters(remove_duplicate=False), *own.named_buffers(remove_duplicate=False)]
        spans = {n: lay(t) for n, t in tensors}
        kept = own.state_dict()
        names |= {f"{PREFIX}{path}.{n}": spans[n] for n in kept}
        beside |= {f"{path}.{n}": s for n, s in spans.items() if n not in kept}
        copies[path] = (_empty(own), spans)
    flat = lay.joined()
    pattern = Pattern(plan, shared, places, copies, tuple((t.dtype, t.numel()) for t in flat), names, beside)
    same = next((p for p in known if p.alike(pattern)), None)
    if same is None:
        known.append(pattern)
    return Packed(same or pattern, flat, weights)


def _empty(module: nn.Module) -> nn.Module:
    """A module like this one, without numbers."""
    memo = {id(t): t.detach().to("meta") for t in module.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)


def forget_modules(name: str, packed: Packed, find: Find) -> None:
    """Take an adapter that was packed off its modules; parameters that somebody else holds give their memory back until it is attached again."""
    refs: dict[tuple[str, str], weakref.ref[nn.Parameter]] = {}
    for path in [*packed.pattern.places, *packed.pattern.copies]:
        holder: Any = find(path)
        refs |= {(path, n): weakref.ref(p) for n, p in holder.veneer[name].named_parameters()}
        del holder.veneer[name]
    for key, ref in refs.items():
        held = ref()
        if held is not None:
            held.data = held.data.new_empty(0)
            packed.trained[key] = ref
