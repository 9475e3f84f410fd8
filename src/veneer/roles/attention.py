"""Attentions: queries, keys and values among siblings, the layer that leads back, and fused ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from ..form import Form
from ..layers import places
from .role import ATTENTION, Role, is_called

_TRIOS = (("query", "key", "value"), ("queries", "keys", "values"), ("q", "k", "v"), ("Q", "K", "V"))
_PAIRS = {"query": "key_value", "q": "kv"}
_OUTPUTS = ("o", "out", "output", "proj", "dense", "c_proj", "o_proj", "out_proj", "out_lin", "to_out", "wo", "linear_out")


def attention(modules: Mapping[str, nn.Module], forms: Mapping[str, Form]) -> Iterator[Role]:
    """The roles of layers in attentions.

    Args:
        modules: of the model, by path.
        forms: of its linear layers, by path.
    """
    by_parent: dict[str, list[str]] = {}
    for path in forms:
        by_parent.setdefault(path.rpartition(".")[0], []).append(path)
    for path, module in modules.items():
        found = places(module)
        if len(found) > 1:
            yield Role(path, "attention", ATTENTION[:3], called=False)
            yield Role(f"{path}.{found[-1].inner}", "attention.output", called=False)
    for parent, children in by_parent.items():
        if not places(modules[parent]):
            group = _separate(children) or _fused(parent, modules[parent], children, forms)
            if group:
                yield from group
                yield from _rest(parent, group, modules, forms)


def _separate(children: list[str]) -> list[Role]:
    """Siblings whose names differ in nothing but q, k and v, or q and kv."""
    by_name = {c.rpartition(".")[2]: c for c in children}
    for name in by_name:
        for trio in _TRIOS:
            for at in re.finditer(trio[0], name):
                own = [by_name.get(name[: at.start()] + word + name[at.end() :]) for word in trio]
                if None not in own:
                    return [Role(str(path), role) for path, role in zip(own, ATTENTION, strict=False)]
                both = by_name.get(name[: at.start()] + _PAIRS.get(trio[0], "kv") + name[at.end() :])
                if both is not None:
                    return [Role(str(own[0]), ATTENTION[0]), Role(both, "attention", ATTENTION[1:3])]
    return []


def _fused(parent: str, module: nn.Module, children: list[str], forms: Mapping[str, Form]) -> list[Role]:
    """One layer for q, k and v: by its name, or in an attention the one that widens up to threefold before one that leads back."""
    for path in children:
        name = path.rpartition(".")[2].lower().replace("_", "")
        if "qkv" in name or "querykeyvalue" in name:
            return [Role(path, "attention", ATTENTION[:3])]
    if is_called(parent, module, "attn", "attention"):
        for path in children:
            wide = forms[path]
            if any(forms[c].out == wide.in_ and forms[c].in_ < wide.out <= 3 * forms[c].in_ for c in children if c != path):
                return [Role(path, "attention", ATTENTION[:3])]
    return []


def _rest(parent: str, group: list[Role], modules: Mapping[str, nn.Module], forms: Mapping[str, Form]) -> Iterator[Role]:
    """The output of an attention, and what else lies in it."""
    query, taken = forms[group[0].path], {r.path for r in group}
    for container in (parent, parent.rpartition(".")[0]):
        is_attention = is_called(container, modules[container], "attn", "attention")
        inside = [p for p in forms if _below(p, container) and p not in taken]
        if container != parent and not is_attention:
            return
        near = inside if is_attention else [p for p in inside if p.rpartition(".")[0] == parent]
        back = [
            p for p in near if forms[p].out == query.in_ and (forms[p].in_ == query.out or (group[0].holds and forms[p].in_ <= query.out))
        ]
        named = [p for p in back or near if set(p[len(container) :].split(".")) & {*_OUTPUTS, *_led_back(group[0].path)}]
        output = (named or back)[-1:]
        if output:
            yield Role(output[0], "attention.output")
        if is_attention:
            yield from (Role(p, "attention") for p in near if p not in output)
        if output:
            return


def _led_back(query: str) -> set[str]:
    """Names of the output beside a query of this name: `o_proj` beside `q_proj`."""
    name = query.rpartition(".")[2]
    return {name.replace(word, out, 1) for word in ("query", "qkv", "q") for out in ("o", "out") if word in name}


def _below(path: str, parent: str) -> bool:
    return not parent or path.startswith(parent + ".")
