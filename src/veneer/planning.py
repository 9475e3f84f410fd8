"""The plan: everything that attaching an adapter would do, and every error it could meet, before anything is done."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import nn

from .config import HEADS_OF_TASK, PeftConfig, TaskType
from .errors import TargetError
from .heads import new_heads
from .layers import kind_of
from .layers.adapted import rebindable
from .methods.base import Method
from .targets import base_modules, matches, saved_paths, target_paths

logger = logging.getLogger("veneer")


@dataclass(frozen=True)
class Site:
    """One layer that will be adapted."""

    path: str
    kind: str
    storage: str
    shape: tuple[int, int]
    method: Method

    @property
    def parameters(self) -> int:
        """The number of trainable parameters there."""
        return self.method.count(*self.shape)


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

    @property
    def trainable(self) -> int:
        """The number of trainable parameters, biases not counted."""
        return sum(s.parameters for s in self.sites) + sum(self.saved.values())

    def __str__(self) -> str:
        rows = [("layer", "kind", "storage", "out × in", "parameters")]
        rows += [(s.path, s.kind, s.storage, f"{s.shape[0]} × {s.shape[1]}", f"{s.parameters:,}") for s in self.sites]
        rows += [(p, "whole module" + (" (new head)" if p in self.new_heads else ""), "", "", f"{n:,}") for p, n in self.saved.items()]
        rows.append(("", "", "", "total", f"{self.trainable:,}"))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = [
            "  ".join(c.rjust(w) if i == 4 else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip() for r in rows
        ]
        if self.biases:
            lines.append(f"biases trained in place: {len(self.biases)}")
        if self.still_random:
            lines.append(f"not from the checkpoint, and frozen: {', '.join(self.still_random)}")
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
    layer  kind    storage  out × in  parameters
    0      linear  float    3 × 4             14
                            total             14
    """
    heads, random = new_heads(model) if fresh else ([], [])
    named = list(config.modules_to_save or [])
    of_task = [h for h in HEADS_OF_TASK.get(TaskType(config.task_type), ()) if hasattr(model, h)] if config.task_type else []
    saved = saved_paths(model, [*named, *(h for h in of_task if h not in named), *heads])
    paths = target_paths(model, config, saved, every_name=fresh)
    modules = dict(base_modules(model))
    sites = []
    for path in paths:
        layer = modules[path]
        kind = kind_of(layer)
        assert kind is not None, path
        rebindable(layer, path)
        _refuse_sharded(layer, path)
        sites.append(Site(path, kind.name, kind.storage(layer).name, kind.shape(layer), config.method(path)))
    counts = {p: sum(q.numel() for n, q in modules[p].named_parameters() if ".veneer." not in f".{n}") for p in saved}
    asked = [*named, *of_task]
    return Plan(
        sites,
        counts,
        [h for h in heads if not matches(asked, h)],
        [r for r in random if not matches(saved, r)],
        _biases(modules, config, paths, saved),
    )


def _biases(modules: dict[str, nn.Module], config: PeftConfig, paths: list[str], saved: list[str]) -> list[str]:
    """Names of the biases to train; those of whole saved modules train in their copy."""
    if config.bias == "none":
        return []
    owners = modules if config.bias == "all" else {p: modules[p] for p in paths}
    kept = [p for p in owners if not any(p == s or p.startswith(s + ".") for s in saved)]
    return [f"{p}.{n}" if p else n for p in kept for n, b in owners[p]._parameters.items() if "bias" in n and b is not None]


def _refuse_sharded(layer: nn.Module, path: str) -> None:
    if any(type(p).__name__ == "DTensor" or hasattr(p, "_local_tensor") for p in layer.parameters(recurse=False)):
        raise TargetError(f"{path} is already sharded (fully_shard or tensor parallel); attach the adapter first, and shard afterwards")
