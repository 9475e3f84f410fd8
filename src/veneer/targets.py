"""Which layers a configuration means: names, regular expressions, "all-linear", layer numbers, exclusions, and a default.

Everything is decided on names and modules before anything is changed, and a name that matches nothing is an error that shows the nearest ones:
an adapter on fewer layers than asked for is the quietest way to lose accuracy.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .config import PeftConfig, matches
from .errors import TargetError, suggest
from .heads import head_modules
from .layers import Fused, fused_weights, is_linear, places, why_not
from .layers.swap import own_modules

if TYPE_CHECKING:
    from .naming import Naming

logger = logging.getLogger("veneer")


@dataclass(frozen=True)
class Targets:
    """The layers that a configuration names.

    Args:
        paths: of the layers, and of the parts of fused layers, in the model's order.
        parts: of the model's fused layers, by path: the fused layer, and the part's name.
        rewritten: fields of the configuration that name modules in other words than today's names → what to write in their place.
    """

    paths: list[str]
    parts: dict[str, tuple[Fused, str]]
    rewritten: dict[str, Any]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` under every name a module has, without the adapters' own modules."""
    return own_modules(model, every_name=True)


def parts_by_path(model: nn.Module, config: PeftConfig, saved: list[str]) -> dict[str, tuple[Fused, str]]:
    """The parts of fused layers outside saved modules, as if they were child modules: path → (fused layer, name of the part)."""
    known = [f for f in fused_weights(model, config.fused_layouts) if not _inside(f.module, saved)]
    return {f"{fused.path}.{name}": (fused, name) for fused in known for name in fused.layout.parts}


def saved_paths(model: nn.Module, names: list[str], *, every_name: bool = True) -> list[str]:
    """Paths of the modules that `modules_to_save` names, outermost first.

    Args:
        every_name: whether a name that matches nothing is an error; files name heads of other models too, and their tensors are checked anyway.

    Raises:
        TargetError: a name that matches nothing, with the nearest names.
    """
    paths = [p for p, _ in base_modules(model) if p]
    found: list[str] = []
    for name in names:
        hits = [p for p in paths if matches([name], p)]
        if not hits and every_name:
            raise TargetError(
                f"modules_to_save: no module is called {name!r}.{suggest(name, {p.rpartition('.')[2] for p in paths} | set(paths))}"
            )
        found += hits
    unique = list(dict.fromkeys(found))
    return [p for p in unique if not any(p.startswith(other + ".") for other in unique)]


def find_targets(model: nn.Module, config: PeftConfig, saved: list[str], *, fresh: bool = True) -> Targets:
    """The layers to adapt.

    Args:
        saved: paths of whole saved modules; nothing inside them is adapted.
        fresh: a new adapter: a listed name that matches nothing is an error even when others match, and role words win over names of modules.

    Raises:
        TargetError: nothing matches, a listed name matches nothing, or a match cannot be adapted.
    """
    from .naming import Naming, exactly, named_patterns
    from .roles import query_and_value

    everything = {p: m for p, m in base_modules(model) if p and not _inside(p, saved)}
    parts = parts_by_path(model, config, saved)
    naming = Naming(model, everything, head_modules(model), {p: fused.module for p, (fused, _) in parts.items()}, roles_first=fresh)
    excluded, excluded_today = naming.meant(config.exclude_modules) if config.exclude_modules else ([], True)
    left_out = set(excluded)
    modules = {p: m for p, m in everything.items() if p not in left_out}
    free = {*modules, *(p for p, (fused, _) in parts.items() if p not in left_out and fused.module in modules)}
    targets, today = config.target_modules, True
    if targets is None:
        hits, today = [p for p in query_and_value(naming.roles) if p in free and layer_number_fits(config, p)], False
        if not hits:
            raise TargetError(
                f"no attention was found by its structure, so target_modules is needed{_of_layers(config)}.{naming.why_nothing('')}"
            )
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        hits = _all_linear(model, modules, naming)
    else:
        meant, today = naming.meant(targets)
        hits = [p for p in meant if p in free and layer_number_fits(config, p)]
        for t in targets if isinstance(targets, list) and fresh else []:
            if not any(layer_number_fits(config, p) for p in naming.word(t)[0]):
                raise TargetError(f"target_modules: {t!r} matches no layer{_of_layers(config)}.{naming.why_nothing(t)}")
        if not hits:
            raise TargetError(f"target_modules: {targets!r} matches no layer{_of_layers(config)}.{naming.why_nothing(str(targets))}")
        for p in hits:
            if p in modules and not places(modules[p]):
                raise TargetError(f"target_modules: {targets!r} matches {p}, which {why_not(modules[p])}")
        if fresh:
            _say_what_is_left_out(targets, naming)
    paths = _once(hits, modules)
    rewritten = named_patterns(config, naming, paths) if fresh else {}
    if not today or not excluded_today:
        rewritten |= {"target_modules": exactly(paths, naming.names), "exclude_modules": config.exclude_modules if excluded_today else None}
    return Targets(paths, parts, rewritten | _other_fields(config, naming, paths, rewritten))


def _say_what_is_left_out(targets: str | list[str], naming: Naming) -> None:
    from .roles import WORDS, fused_with

    for word in targets if isinstance(targets, list) else []:
        fused = fused_with(word, naming.roles) if word in WORDS and not naming.word(word)[1] else []
        if fused:
            logger.warning("%s leaves out %d fused layers that hold it with others, such as %s", word, len(fused), fused[0])
        once = naming.once_more(word) if naming.word(word)[1] else []
        if once:
            logger.warning(
                "%s is a name of today; in older releases it meant %d layers more, such as %s; name them if they are meant",
                word,
                len(once),
                once[0],
            )


def _other_fields(config: PeftConfig, naming: Naming, paths: list[str], rewritten: dict[str, Any]) -> dict[str, Any]:
    """Fields of single methods that name some of the targets."""
    from .naming import exactly

    changed: dict[str, Any] = {}
    for name in config.NAMING:
        words = getattr(config, name)
        meant, today = naming.meant(words) if words else ([], True)
        if not today or (words and "target_modules" in rewritten):
            changed[name] = exactly([p for p in meant if p in paths], naming.names)
            if isinstance(changed[name], list) and isinstance(rewritten.get("target_modules"), list):
                changed["target_modules"] = sorted({*rewritten["target_modules"], *changed[name]})
    return changed


def _once(paths: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """One path for each module and part, the first."""
    return list({(id(modules[p]) if p in modules else p): p for p in reversed(paths)}.values())[::-1]


def _unknown_part(modules: dict[str, nn.Module], name: str) -> str:
    """What to do where a name means a part of a layer whose layout is not known."""
    whole, _, _ = name.rpartition(".")
    found = next((p for p, m in modules.items() if whole and matches([whole], p) and places(m)), None)
    if found is None:
        return ""
    return f" {found} has no known parts; where it is a fused projection, say where they lie, such as fused_layouts={{{whole!r}: ['q', 'k', 'v']}}."


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], naming: Naming) -> list[str]:
    heads = head_modules(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    hits = []
    for p, m in modules.items():
        if is_linear(m) and m is not output and not _inside(p, heads):
            hits.append(p)
    if not hits:
        raise TargetError(f"target_modules: 'all-linear' finds no linear layer outside the head.{naming.why_nothing('')}")
    return hits


def _inside(path: str, parents: list[str]) -> bool:
    return any(path == p or path.startswith(p + ".") for p in parents)


def layer_number_fits(config: PeftConfig, path: str) -> bool:
    """Whether a layer is among those that `layers_to_transform` numbers."""
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
