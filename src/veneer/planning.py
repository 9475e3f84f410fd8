"""The plan: everything that attaching an adapter would do, and every error it could meet, before anything is done."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from .config import HEADS_OF_TASK, PREFIX, PeftConfig, TaskType, matches
from .errors import TargetError, suggest
from .form import Form
from .heads import new_heads
from .layers import LayerKind, Place, parameter_place, places
from .layers.adapted import rebindable
from .layers.storages import is_packed, number_of
from .layers.swap import own_class
from .listing import aligned, together
from .methods.base import Method
from .targets import Targets, base_modules, find_targets, saved_paths

logger = logging.getLogger("veneer")

_MOST = 6
"""Classes of frozen layers that a table names."""


@dataclass(frozen=True)
class Site:
    """One weight that will be adapted.

    Args:
        path: of the module that the configuration names.
        module: path of the module that holds the weight.
        kind: how the weight acts.
        key: what stands between `path` and the parameters' names in the file.
        form: the weight's rows and columns.
        method: what adapts it.
        storage: how it is packed.
    """

    path: str
    module: str
    kind: LayerKind
    key: str
    form: Form
    method: Method
    storage: str

    @property
    def parameters(self) -> int:
        """The number of trainable parameters there."""
        return self.method.count(self.form)

    @property
    def is_part(self) -> bool:
        """Whether it is some rows of a fused weight."""
        return self.kind.whole is not self.kind

    def file_key(self, key: str) -> str:
        """The name in the file of the tensor that the method calls `key`."""
        return f"{PREFIX}{self.path}.{self.key}{key}"

    @property
    def weight(self) -> str:
        """What a table calls it: the path, and the weight's name where the layer has several."""
        return self.path if self.kind.called or self.is_part else f"{self.module}.{self.kind.tensor}"


@dataclass(frozen=True)
class Plan:
    """What `attach` will do; printing it shows a table."""

    sites: list[Site]
    saved: dict[str, int]
    """Module path → its number of parameters: trained whole, kept beside the adapter."""
    new_heads: list[str] = field(default_factory=list)
    """Those of `saved` that nobody asked for: their weights are not from the checkpoint."""
    still_random: list[str] = field(default_factory=list)
    """Modules whose weights are not from the checkpoint and that will not train."""
    biases: list[str] = field(default_factory=list)
    """Names of the base model's biases that will train in place."""
    rewritten: dict[str, Any] = field(default_factory=dict)
    """Fields of the configuration that named modules in other words than today's names → what stands for them in the file."""

    frozen: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What stays as it is: class of layer → (how many, their parameters), the largest first."""

    @property
    def trainable(self) -> int:
        """The number of trainable parameters, biases not counted."""
        return sum(s.parameters for s in self.sites) + sum(self.saved.values())

    @cached_property
    def holders(self) -> list[str]:
        """Paths of the modules that hold something of the adapter."""
        return [*dict.fromkeys(s.module for s in self.sites), *self.saved]

    def to_dict(self) -> dict[str, Any]:
        """Everything that the table says, as plain values."""
        layers = [
            {"path": s.weight, "kind": s.kind.name, "storage": s.storage, "shape": str(s.form), "parameters": s.parameters}
            for s in self.sites
        ]
        frozen = {name: {"layers": n, "parameters": size} for name, (n, size) in self.frozen.items()}
        heads = {"new_heads": self.new_heads, "still_random": self.still_random}
        return {
            "layers": layers,
            "whole_modules": self.saved,
            **heads,
            "biases": self.biases,
            "trainable": self.trainable,
            "frozen": frozen,
        }

    def __str__(self) -> str:
        cells = [(s.kind.name, s.storage, str(s.form), s.parameters) for s in self.sites]
        rows = [("layer", "kind", "storage", "out × in", "layers", "parameters")]
        for path, at in together([s.weight for s in self.sites], alike=cells):
            kind, storage, form, each = cells[at[0]]
            rows.append((path, kind, storage, form, str(len(at)), f"{len(at) * each:,}"))
        for path, n in self.saved.items():
            rows.append((path, "whole module" + (" (newly initialised)" if path in self.new_heads else ""), "", "", "1", f"{n:,}"))
        rows.append(("", "", "", "total", str(len(self.sites) + len(self.saved)), f"{self.trainable:,}"))
        lines = [aligned(rows, right=[4, 5])]
        if self.biases:
            lines.append(f"biases trained in place: {len(self.biases)}")
        if self.frozen:
            kinds = ", ".join(f"{n} {name}" for name, (n, _) in list(self.frozen.items())[:_MOST])
            more = ", …" if len(self.frozen) > _MOST else ""
            lines.append(f"frozen: {sum(size for _, size in self.frozen.values()):,} parameters of {kinds}{more}")
        if self.still_random:
            lines.append(f"newly initialised, and frozen: {', '.join(path for path, _ in together(self.still_random))}")
        return "\n".join(lines)


def plan(model: nn.Module, config: PeftConfig, *, fresh: bool = True) -> Plan:
    """What `get_peft_model(model, config)` would adapt, train whole and leave alone; changes nothing.

    Args:
        model: the model to adapt.
        config: a method's configuration.
        fresh: a new adapter, for which new heads are added and every listed name must match; False when an adapter is loaded from a file.

    Raises:
        TargetError: a name that matches nothing, a layer that cannot be adapted, or a model that is already sharded.

    >>> import torch
    >>> from veneer import LoraConfig
    >>> print(plan(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"])))
    layer  kind    storage  out × in  layers  parameters
    0      linear  float    3 × 4          1          14
                            total          1          14
    frozen: 15 parameters of 1 Linear
    """
    heads, random = new_heads(model) if fresh else ([], [])
    named = list(config.modules_to_save or [])
    of_task = [h for h in HEADS_OF_TASK.get(TaskType(config.task_type), ()) if hasattr(model, h)] if config.task_type else []
    saved = saved_paths(model, [*named, *(h for h in of_task if h not in named), *heads], every_name=fresh)
    modules = dict(base_modules(model))
    _refuse_packed_copies(modules, saved, heads)
    named_here = bool(config.target_modules) or not config.target_parameters
    targets = find_targets(model, config, saved, fresh=fresh) if named_here else Targets([], {}, {})
    config = copy.copy(config)
    vars(config).update(targets.rewritten)
    sites = [*_named(modules, config, targets), *_bare(modules, config, saved)]
    _refuse_twice(sites)
    counts = {p: sum(q.numel() for n, q in modules[p].named_parameters() if ".veneer." not in f".{n}") for p in saved}
    asked = [*named, *of_task]
    return Plan(
        sites,
        counts,
        [h for h in heads if not matches(asked, h)],
        [r for r in random if not matches(saved, r)],
        _biases(modules, config, sites, saved),
        targets.rewritten,
        _frozen(modules, saved),
    )


def _frozen(modules: dict[str, nn.Module], saved: list[str]) -> dict[str, tuple[int, int]]:
    """What stays as it is, by class; a weight that several modules share is counted once."""
    found: dict[str, tuple[int, int]] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        own = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(id(p) for p in own)
        if own and not any(path == s or path.startswith(s + ".") for s in saved):
            name = own_class(module).__name__
            layers, size = found.get(name, (0, 0))
            found[name] = (layers + 1, size + sum(number_of(p) for p in own))
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _named(modules: dict[str, nn.Module], config: PeftConfig, targets: Targets) -> list[Site]:
    """The weights of the modules that `target_modules` names."""
    paths = targets.paths
    inside = {inner for p in paths if p in modules for inner in _inner_paths(p, modules[p])}
    found = []
    for path in paths:
        if path not in modules:
            fused, part = targets.parts[path]
            found.append(_site(path, fused.module, modules[fused.module], Place("", fused.part(part)), config))
            continue
        for place in places(modules[path]):
            inner = f"{path}.{place.inner}" if place.inner else path
            if place.inner and inner in paths:
                raise TargetError(f"target_modules names {path} and {inner}, which is adapted with it; leave {inner} out")
            if path not in inside:
                found.append(_site(path, inner, modules[inner], place, config))
    return found


def _inner_paths(path: str, module: nn.Module) -> list[str]:
    return [f"{path}.{place.inner}" for place in places(module) if place.inner]


def _bare(modules: dict[str, nn.Module], config: PeftConfig, saved: list[str]) -> list[Site]:
    """The weights that `target_parameters` names."""
    if not config.target_parameters:
        return []
    names = [(p, n) for p, m in modules.items() for n in m._parameters if not any(p == s or p.startswith(s + ".") for s in saved)]
    full = {f"{p}.{n}" if p else n: (p, n) for p, n in names}
    for wanted in config.target_parameters:
        if not any(matches([wanted], f) for f in full):
            raise TargetError(f"target_parameters: no parameter is called {wanted!r}.{suggest(wanted, [*full, *(n for _, n in names)])}")
    hits = [f for f in full if matches(config.target_parameters, f) and not matches(config.exclude_modules, full[f][0])]
    sites = []
    for path in dict.fromkeys(full[f][0] for f in hits):
        own = [full[f][1] for f in hits if full[f][0] == path]
        for i, name in enumerate(own):
            place = parameter_place(modules[path], name)
            if place is None:
                raise TargetError(f"target_parameters: {path}.{name} is neither a matrix nor a stack of matrices of floating-point numbers")
            # The format wraps a module once for each of its parameters, the first one innermost.
            key = "base_layer." * (len(own) - 1 - i)
            sites.append(_site(path, path, modules[path], Place("", place.kind, key), config, named=f"{path}.{name}"))
    return sites


def _site(path: str, inner: str, module: nn.Module, place: Place, config: PeftConfig, named: str | None = None) -> Site:
    """One weight, after everything that could be wrong with adapting it was looked for."""
    kind, method = place.kind, config.method(named or path)
    form = kind.form(module)
    if kind.called:
        rebindable(module, path)
    elif method.noise.input:
        raise TargetError(
            f"{inner}.{kind.tensor} is read as a weight, so there is no input to drop numbers of; set the {config.peft_type} configuration's dropout to 0"
        )
    if method.shifts and kind.offset is None:
        raise TargetError(
            f"{inner}.{kind.tensor} goes with no bias, and the {config.peft_type} configuration trains one (lora_bias); leave that out"
        )
    _refuse_sharded(module, inner)
    why = method.why_not(form)
    if why is not None:
        raise TargetError(f"{path} {why}")
    return Site(path, inner, kind, place.key, form, method, kind.storage(module).name)


def _refuse_twice(sites: list[Site]) -> None:
    seen: dict[tuple[str, bool], Site] = {}
    slots: dict[tuple[str, str], Site] = {}
    for site in sites:
        seen.setdefault((site.module, site.kind.called), site)
        clash = seen.get((site.module, not site.kind.called))
        if clash is not None or slots.setdefault((site.module, site.kind.slot), site) is not site:
            raise TargetError(f"{site.weight} would be adapted twice, by target_modules and by target_parameters; name it in one of them")
    for site in sites:
        other = slots.get((site.module, site.kind.tensor))
        if other is not None and other is not site and site.kind.tensor == other.kind.tensor:
            raise TargetError(f"{site.path} is a part of {other.path}, which is adapted whole; name one of them in target_modules")


def _biases(modules: dict[str, nn.Module], config: PeftConfig, sites: list[Site], saved: list[str]) -> list[str]:
    """Names of the biases to train; those of whole saved modules train in their copy."""
    if config.bias == "none":
        return []
    owners = modules if config.bias == "all" else {s.module: modules[s.module] for s in sites}
    kept = [p for p in owners if not any(p == s or p.startswith(s + ".") for s in saved)]
    return [f"{p}.{n}" if p else n for p in kept for n, b in owners[p]._parameters.items() if n == "bias" and b is not None]


def _refuse_packed_copies(modules: dict[str, nn.Module], saved: list[str], heads: list[str]) -> None:
    for path in saved:
        if any(is_packed(p) for p in modules[path].parameters()):
            why = (
                "its weights are not from the checkpoint, so it has to train whole" if path in heads else "modules_to_save trains it whole"
            )
            raise TargetError(
                f"{path} is packed, and packed numbers cannot be trained; {why}; load the model with that module left as it is "
                f'(such as BitsAndBytesConfig(llm_int8_skip_modules=["{path}"]), or modules_to_not_convert)'
            )


def _refuse_sharded(layer: nn.Module, path: str) -> None:
    if any(type(p).__name__ == "DTensor" or hasattr(p, "_local_tensor") for p in layer.parameters(recurse=False)):
        raise TargetError(f"{path} is already sharded (fully_shard or tensor parallel); attach the adapter first, and shard afterwards")
