"""The names that a model's modules had in older releases of transformers.

transformers renames modules between releases and keeps, per architecture, the renamings of old checkpoints' keys. Read backwards they give every
module its old name, with no table of our own to go stale. They are internal to transformers, so any other release may lack them: then there are no
old names, and everything else works.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import nn

from .layers.swap import own_modules, own_parameters


def old_names(model: nn.Module) -> list[dict[str, str]]:
    """Tables of a model's modules with weights: {path today: path then}; empty where nothing was renamed.

    There are two where a prefix was part of the old names for some of the model's classes only.
    """
    paths = {name: name.rpartition(".")[0] for name, _ in own_parameters(model)}
    tables: list[dict[str, str]] = []
    for backwards in _renamings(model):
        then: dict[str, set[str]] = {}
        for name, path in paths.items():
            old = backwards(name)
            own = name[len(path) :]
            then.setdefault(path, set()).add(old[: -len(own)] if old is not None and old.endswith(own) else "")
        table = {path: olds.pop() for path, olds in then.items() if len(olds) == 1 and "" not in olds}
        times = Counter(table.values())
        unique = {path: old for path, old in table.items() if times[old] == 1}
        if any(path != old for path, old in unique.items()) and unique not in tables:
            tables.append(unique)
    return tables


def _renamings(model: nn.Module) -> Iterator[Any]:
    """Functions from a parameter's name today to its name then, or None where it was another tensor."""
    if "transformers" not in sys.modules:
        return
    try:
        mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping
        prefix_change = import_module("transformers.core_model_loading").PrefixChange
        converter = import_module("transformers.core_model_loading").WeightConverter
    except (ImportError, AttributeError):
        return
    per_model = [(path, [t.reverse_transform() for t in mapping(m, add_legacy=False)[::-1]]) for path, m in _outermost(model)]
    for kinds in ((), (prefix_change,)):
        chosen = [(path, [t for t in ts if not kinds or not isinstance(t, kinds)]) for path, ts in per_model]
        if any(ts for _, ts in chosen):
            yield lambda name, chosen=chosen: _backwards(name, chosen, converter)


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """transformers' models: the model itself, or those inside one that is not transformers' own."""
    inside: list[str] = []
    for path, module in own_modules(model):
        own = any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__)
        if own and not any(p == "" or path.startswith(p + ".") for p in inside):
            inside.append(path)
            yield path, module


def _backwards(name: str, models: list[tuple[str, list[Any]]], converter: type) -> str | None:
    for path, transforms in models:
        head = f"{path}." if path else ""
        if name.startswith(head):
            rest = name[len(head) :]
            for transform in transforms:
                new, matched = transform.rename_source_key(rest)
                if matched is not None and isinstance(transform, converter):
                    return None
                rest = new
            return head + rest
    return name
