"""Files whose tensors go by other names than today's: older module names, names as they stand in a wrapped model, no prefix.

Each spelling is put right only where that leaves nothing over: what a file holds and what the model expects must become the same set. Everything else
is left to the strict check, which names what does not fit.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .config import PREFIX, PeftConfig, matches, pattern_value
from .targets import base_modules, layer_number_fits

_USUAL = 2
"""Names behind a module's path in a usual key, such as `lora_A.weight`."""


def todays(model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """A file's configuration and tensors by the names that the model's modules have today; as they are where they have them already.

    Args:
        model: the base model, with or without adapters.
        config: of the file; not changed.
        tensors: of the file.
    """
    found, table = _renamed_tensors(model, tensors)
    return (config if table is None else _in_todays_names(config, table, [p for p, _ in base_modules(model)])), found


def todays_states(model: nn.Module, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a schedule has learnt, by the names that the model's modules have today."""
    return {k.removeprefix(PREFIX): t for k, t in _renamed_tensors(model, states)[0].items()}


def _renamed_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors, and the table of older names that they went by."""
    found = dict(tensors) if any(k.startswith("base_model.") for k in tensors) else {PREFIX + k: t for k, t in tensors.items()}
    table = _spelling(model, found)
    then = {old: path for path, old in (table or {}).items()}
    renamed = {PREFIX + _renamed(k.removeprefix(PREFIX), then) if k.startswith(PREFIX) else k: t for k, t in found.items()}
    return (renamed, table) if len(renamed) == len(found) else (found, None)


def _spelling(model: nn.Module, keys: Iterable[str]) -> dict[str, str] | None:
    """The table of older names that a file's keys go by: they leave less of each key over than the names of today."""
    from .oldnames import old_names

    inside = [k.removeprefix(PREFIX) for k in keys if k.startswith(PREFIX)]
    owners = {p for p, m in base_modules(model) if p and any(True for _ in m.parameters(recurse=False))}
    if all(_left_over([k], owners) <= _USUAL for k in inside):
        return None
    best, least = None, _left_over(inside, owners)
    for table in old_names(model):
        left = _left_over(inside, set(table.values()))
        if left < least:
            best, least = table, left
    return best


def _left_over(keys: list[str], paths: set[str]) -> int:
    """How many of the names in the keys are not those of the longest of the paths that a key begins with."""
    return sum(k.count(".") + 1 - next((n for n in _lengths(k) if ".".join(k.split(".")[:n]) in paths), 0) for k in keys)


def _lengths(key: str) -> Iterator[int]:
    return iter(range(key.count("."), 0, -1))


def _renamed(key: str, then: Mapping[str, str]) -> str:
    """A key whose longest beginning that is a name then is replaced by the name today."""
    parts = key.split(".")
    for n in _lengths(key):
        path = then.get(".".join(parts[:n]))
        if path is not None:
            return ".".join([path, *parts[n:]])
    return key


def _in_todays_names(config: PeftConfig, table: Mapping[str, str], every: list[str]) -> PeftConfig:
    """A copy of a configuration that names by today's names the modules that it meant by names then."""
    from .naming import exactly

    new = copy.copy(config)
    words = config.target_modules
    chosen = [
        p for p, old in table.items() if matches(words, old) and not matches(config.exclude_modules, old) and layer_number_fits(config, old)
    ]
    if chosen:
        new.target_modules = exactly(chosen, every)
        new.exclude_modules = new.layers_to_transform = new.layers_pattern = None
    if config.modules_to_save:
        new.modules_to_save = [n for word in config.modules_to_save for n in _saved(word, table, every)]
    then = {old: path for path, old in table.items()}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name, None)
        if patterns and any(isinstance(v, list) for v in patterns.values()):
            setattr(new, name, {_renamed(k, then): v for k, v in patterns.items()})
        elif patterns:
            values = {p: pattern_value(patterns, table[p], None) for p in chosen}
            setattr(new, name, {f"^{re.escape(p)}": v for p, v in values.items() if v is not None})
    for name in config.NAMING:
        if getattr(config, name):
            setattr(new, name, exactly([p for p in chosen if matches(getattr(config, name), table[p])], every))
    return new


def _saved(word: str, table: Mapping[str, str], every: list[str]) -> list[str]:
    if any(matches([word], p) for p in every):
        return [word]
    return [p for p, old in table.items() if matches([word], old)] or [word]


def fitted(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """The tensors of a file by the expected keys, where the difference is in spelling only; otherwise as they are.

    Args:
        found: tensors by their keys in the file, in today's module names.
        expected: tensors by the keys that the model has.
        base: the base model's own parameter of a name, or None.
    """
    own = {k: t for k, t in found.items() if k in expected or not _is_second(k, found)}
    without = {k: t for k, t in own.items() if k in expected or not _is_the_bases(k, t, base)}
    for kept in (own, without):
        pairs = _respelt(kept, expected)
        if kept.keys() == expected.keys() or len(pairs) == len(expected.keys() - kept.keys()) == len(kept.keys() - expected.keys()):
            return {pairs.get(k, k): t for k, t in kept.items()}
    # What is then left over is what the strict check should name.
    return {pairs.get(k, k): t for k, t in without.items()}


def _respelt(kept: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """{key in the file: expected key} for every key that is missing, or nothing."""
    left, missing = [k for k in kept if k not in expected], [k for k in expected if k not in kept]
    known = {part for k in missing for part in k.split(".")}
    times = Counter(part for k in left for part in set(k.split(".")) - known)
    for name in [None, *(part for part, _ in times.most_common(8))]:
        for dropped in ((), ("modules_to_save",), ("base_layer",), ("modules_to_save", "base_layer")):
            pairs = _pairs(left, missing, name, dropped)
            if pairs:
                return pairs
    return {}


def _pairs(left: list[str], missing: list[str], name: str | None, dropped: tuple[str, ...]) -> dict[str, str]:
    """{key in the file: expected key}, if each is another's once these parts of the keys are left out."""
    wanted = {_without(k, None, dropped): k for k in missing}
    short = {k: _without(k, name, dropped) for k in left}
    # The wrapped model keeps some vectors as the weight of a module, the file without it.
    short = {k: s if s in wanted or s[-1:] != ("weight",) else s[:-1] for k, s in short.items()}
    found = {k: wanted[s] for k, s in short.items() if s in wanted}
    return found if len(found) == len(set(found.values())) == len(wanted) == len(missing) else {}


def _without(key: str, name: str | None, dropped: tuple[str, ...]) -> tuple[str, ...]:
    parts = [p for p in key.split(".") if p not in dropped]
    if name in parts:
        del parts[len(parts) - 1 - parts[::-1].index(name)]
    return tuple(parts)


def _is_second(key: str, found: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a second copy that the format's other writer adds for whole modules."""
    return ".original_module." in key or (".modules_to_save." in key and key.replace(".modules_to_save.", ".") in found)


def _is_the_bases(key: str, tensor: Tensor, base: Callable[[str], Tensor | None]) -> bool:
    """Whether a tensor is what the base model holds anyway; of a model without weights, its shape says so."""
    own = base(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    return own is not None and own.shape == tensor.shape and (own.is_meta or torch.equal(own.cpu(), tensor.to(own.dtype)))
