"""What a model's layers can be called in `target_modules`: names of today, of older transformers releases, and roles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .heads import head_modules
from .layers import fused_weights, places
from .listing import aligned, together
from .naming import Naming
from .targets import base_modules


@dataclass(frozen=True)
class TargetNames:
    """The names of a model's layers; printing it shows a table.

    Args:
        roles: role word → paths of the layers it means.
        names: last names of the layers that can be adapted, and of parts of fused ones → how many they are.
        older: names in older transformers releases → the names today.
    """

    roles: dict[str, list[str]]
    names: dict[str, int]
    older: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"roles": self.roles, "names": self.names, "older_names": self.older}

    def __str__(self) -> str:
        rows = [("role", "layers")]
        for role, paths in self.roles.items():
            lines = [line for line, _ in together(paths)]
            rows += [(role if i == 0 else "", line) for i, line in enumerate(lines)]
        text = [aligned(rows)] if self.roles else []
        text.append(f"names: {', '.join(self.names)}")
        if self.older:
            text.append("older names: " + ", ".join(f"{old} ({', '.join(now)})" for old, now in self.older.items()))
        return "\n".join(text)


def target_names(model: nn.Module) -> TargetNames:
    """The words that `target_modules` understands for a model; changes nothing.

    Args:
        model: with or without weights (on the meta device), with or without adapters.

    >>> import torch
    >>> print(target_names(torch.nn.TransformerEncoderLayer(8, 2, 16)))
    role              layers
    attention         self_attn
    attention.query   self_attn.in_proj_weight.q
    attention.key     self_attn.in_proj_weight.k
    attention.value   self_attn.in_proj_weight.v
    attention.output  self_attn.out_proj
    mlp.up            linear1
    mlp.down          linear2
    names: self_attn, out_proj, linear1, linear2, in_proj_weight.q, in_proj_weight.k, in_proj_weight.v
    """
    modules = {p: m for p, m in base_modules(model) if p}
    parts = {f"{f.path}.{part}": f.module for f in fused_weights(model) for part in f.layout.parts}
    naming = Naming(model, modules, head_modules(model), parts)
    usable = [p for p, m in modules.items() if places(m)]
    names: dict[str, int] = {}
    for path in usable:
        name = path.rpartition(".")[2]
        if not name.isdigit():
            names[name] = names.get(name, 0) + 1
    for path in parts:
        name = ".".join(path.split(".")[-2:])
        names[name] = names.get(name, 0) + 1
    older: dict[str, list[str]] = {}
    for table in naming.old:
        for then, today in _older(table, usable).items():
            older[then] = list(dict.fromkeys([*older.get(then, []), *today]))
    return TargetNames({w: naming.own_role(w) for w in naming.role_words if naming.own_role(w)}, names, older)


def _older(table: dict[str, str], usable: list[str]) -> dict[str, list[str]]:
    """Ends of the names then, each as short as tells one name of today from the others → the names today."""
    ends: dict[str, dict[str, None]] = {}
    last = {path: path.rpartition(".")[2] for path in usable if path in table and table[path] != path}
    for path, today in last.items():
        for end in _ends(table[path]):
            ends.setdefault(end, {})[today] = None
    found: dict[str, list[str]] = {}
    for path, today in last.items():
        own = _ends(table[path])
        end = next((e for e in own if len(ends[e]) == 1), own[-1])
        if end.rpartition(".")[2] != today:
            found[end] = list(ends[end])
    return found


def _ends(path: str) -> list[str]:
    """The last names of a path, from one of them to three, without numbers."""
    parts = path.split(".")
    return [".".join(parts[-n:]) for n in range(1, min(3, len(parts)) + 1) if not any(p.isdigit() for p in parts[-n:])]
