"""Which modules a configuration names: suffixes, regular expressions, "all-linear", layer numbers, exclusions, and a default.

Everything is decided on names and modules before anything is changed, and a name that matches nothing is an error that shows the nearest ones:
an adapter on fewer layers than asked for is the quietest way to lose accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from .config import PeftConfig, matches
from .errors import TargetError, suggest
from .heads import head_modules
from .layers import Fused, fused_weights, is_linear, places, why_not
from .layers.swap import ADAPTERS

QUERY_NAMES = ("q_proj", "query", "q_lin", "to_q", "wq", "q")
VALUE_NAMES = ("v_proj", "value", "v_lin", "to_v", "wv", "v")


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` under every name a module has, without the adapters' own modules."""
    for path, module in model.named_modules(remove_duplicate=False):
        if f".{ADAPTERS}." not in f".{path}.":
            yield path, module


def parts_by_path(model: nn.Module, config: PeftConfig, saved: list[str]) -> dict[str, tuple[Fused, str]]:
    """The parts of fused weights, as if they were child modules: path → (fused weight, name of the part)."""
    found = {}
    for fused in fused_weights(model, config.fused_layouts):
        if not _inside(fused.module, saved) and not matches(config.exclude_modules, fused.module):
            for name in fused.layout.parts:
                path = f"{fused.path}.{name}"
                if not matches(config.exclude_modules, path):
                    found[path] = (fused, name)
    return found


def saved_paths(model: nn.Module, names: list[str]) -> list[str]:
    """Paths of the modules that `modules_to_save` names, outermost first.

    Raises:
        TargetError: a name that matches nothing, with the nearest names.
    """
    paths = [p for p, _ in base_modules(model) if p]
    found: list[str] = []
    for name in names:
        hits = [p for p in paths if matches([name], p)]
        if not hits:
            raise TargetError(
                f"modules_to_save: no module is called {name!r}.{suggest(name, {p.rpartition('.')[2] for p in paths} | set(paths))}"
            )
        found += hits
    unique = list(dict.fromkeys(found))
    return [p for p in unique if not any(p.startswith(other + ".") for other in unique)]


def target_paths(
    model: nn.Module, config: PeftConfig, saved: list[str], parts: dict[str, tuple[Fused, str]], *, every_name: bool = True
) -> list[str]:
    """Paths of the layers, and of the parts of fused layers, to adapt, in the model's order.

    Args:
        saved: paths of whole saved modules; nothing inside them is adapted.
        parts: as `parts_by_path` gives them; a name means a part only where no module has it.
        every_name: whether a listed name that matches nothing is an error even when others match.

    Raises:
        TargetError: nothing matches, a listed name matches nothing, or a match cannot be adapted.
    """
    everything = {p: m for p, m in base_modules(model) if p and not _inside(p, saved)}
    modules = {p: m for p, m in everything.items() if not matches(config.exclude_modules, p)}
    targets = config.target_modules
    if targets is None:
        return _once(_default(modules, parts), modules)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return _once(_all_linear(model, modules), modules)
    hits: set[str] = set()
    for t in [targets] if isinstance(targets, str) else [[t] for t in targets]:
        named = [p for p in everything if matches(t, p) and _layer_number_fits(config, p)]
        found = named or [p for p in parts if matches(t, p) and _layer_number_fits(config, p)]
        if not found and (every_name or isinstance(targets, str)):
            name = targets if isinstance(targets, str) else t[0]
            raise TargetError(
                f"target_modules: {name!r} matches no layer{_of_layers(config)}.{_unknown_part(everything, name)}{_known(modules, name, parts)}"
            )
        hits.update(p for p in found if p in modules or p in parts)
    if not hits:
        raise TargetError(f"target_modules: {targets!r} matches no layer{_of_layers(config)}.{_known(modules, str(targets), parts)}")
    for p in hits:
        if p in modules and not places(modules[p]):
            raise TargetError(f"target_modules: {targets!r} matches {p}, which {why_not(modules[p])}")
    return _once([p for p in [*modules, *parts] if p in hits], modules)


def _once(paths: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """One path for each module, the first."""
    return list({(id(modules[p]) if p in modules else p): p for p in reversed(paths)}.values())[::-1]


def _unknown_part(modules: dict[str, nn.Module], name: str) -> str:
    """What to do where a name means a part of a layer whose layout is not known."""
    whole, _, _ = name.rpartition(".")
    found = next((p for p, m in modules.items() if whole and matches([whole], p) and places(m)), None)
    if found is None:
        return ""
    return f" {found} has no known parts; where it is a fused projection, say where they lie, such as fused_layouts={{{whole!r}: ['q', 'k', 'v']}}."


def _default(modules: dict[str, nn.Module], parts: dict[str, tuple[Fused, str]]) -> list[str]:
    hits = [p for p, m in modules.items() if p.rpartition(".")[2] in QUERY_NAMES + VALUE_NAMES and places(m)]
    hits += [p for p, (_, name) in parts.items() if name in ("q", "v")]
    if not hits:
        raise TargetError(f"no attention query and value layers were found by name, so target_modules is needed.{_known(modules, '')}")
    return hits


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    heads = head_modules(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    hits = []
    for p, m in modules.items():
        if is_linear(m) and m is not output and not _inside(p, heads):
            hits.append(p)
    if not hits:
        raise TargetError(f"target_modules: 'all-linear' finds no linear layer outside the head.{_known(modules, '')}")
    return hits


def _inside(path: str, parents: list[str]) -> bool:
    return any(path == p or path.startswith(p + ".") for p in parents)


def _layer_number_fits(config: PeftConfig, path: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
        if found:
            return int(found.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _of_layers(config: PeftConfig) -> str:
    return "" if config.layers_to_transform is None else f" among layers_to_transform={config.layers_to_transform}"


def _known(modules: dict[str, nn.Module], name: str, parts: dict[str, tuple[Fused, str]] | None = None) -> str:
    """The nearest names, and the names there are."""
    leaves = list(dict.fromkeys(p.rpartition(".")[2] for p, m in modules.items() if places(m)))
    leaves += dict.fromkeys(f"{fused.path.rpartition('.')[2]}.{part}" for fused, part in (parts or {}).values())
    numbered = [n for n in leaves if not n.isdigit()] or leaves
    near = suggest(name, numbered) or suggest(name.rpartition(".")[2], numbered)
    if not leaves:
        return near + " The model has no layer of a supported kind."
    return f"{near} Layers that can be adapted are called: {', '.join(numbered[:12])}{' …' if len(numbered) > 12 else ''}"
