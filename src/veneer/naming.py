"""What a word of a configuration means in a model: a module's name today, its name in an older release of transformers, or a role.

Names of today come first, so that a file means here what it means to every other reader of the format. The two others are words that no module
answers to, and what they meant is written out by today's names (`exactly`) before it reaches a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import nn

from .config import PeftConfig, matches
from .errors import TargetError, suggest
from .layers import places
from .oldnames import old_names
from .roles import WORDS, Role, fused_with, roles, with_role


class Naming:
    """The names of one model.

    Args:
        model: whose older names are asked for.
        modules: that words may mean, by path.
        heads: paths of modules that are the model's heads.
        parts: paths of the parts of fused layers → path of the module that holds the layer's weight.
        roles_first: let a role word win over modules of that name which are among those it means.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        heads: list[str],
        parts: Mapping[str, str] | None = None,
        *,
        roles_first: bool = True,
    ) -> None:
        self.model, self.modules, self.heads, self.roles_first = model, modules, heads, roles_first
        self.parts = parts or {}

    @cached_property
    def names(self) -> list[str]:
        """Paths of the modules, each followed by its parts."""
        own: dict[str, list[str]] = {}
        for part, module in self.parts.items():
            own.setdefault(module, []).append(part)
        return [name for p in self.modules for name in (p, *own.get(p, []))]

    @cached_property
    def old(self) -> list[dict[str, str]]:
        """Tables of older names."""
        return [{today: then for today, then in table.items() if today in self.modules} for table in old_names(self.model)]

    @cached_property
    def roles(self) -> list[Role]:
        """Every layer's role."""
        return roles({"": self.model, **self.modules}, self.heads, self.parts)

    def meant(self, words: str | list[str]) -> tuple[list[str], bool]:
        """Paths that words mean, in the model's order, and whether modules are called so today."""
        if isinstance(words, str):
            return self._pattern(words)
        each = [self.word(w) for w in words]
        found = {p for paths, _ in each for p in paths}
        return [p for p in self.names if p in found], all(today for _, today in each)

    def word(self, word: str) -> tuple[list[str], bool]:
        """Paths that one name means, and whether modules are called so today; none if it means nothing."""
        today = [p for p in self.modules if matches([word], p)]
        usable = any(places(self.modules[p]) for p in today)
        of_role = with_role(word, self.roles) if word in WORDS and (self.roles_first or not usable) else []
        if of_role and set(of_role) >= {p for p in today if places(self.modules[p])}:
            return of_role, False
        if today or (parts := [p for p in self.names if p in self.parts and matches([word], p)]):
            return today or parts, True
        return self._then([word]), False

    def _pattern(self, pattern: str) -> tuple[list[str], bool]:
        today = [p for p in self.modules if matches(pattern, p)]
        if any(places(self.modules[p]) for p in today):
            return today, True
        parts = [p for p in self.names if p in self.parts and matches(pattern, p)]
        if parts:
            return parts, True
        found = self._then(pattern)
        if not found and re.fullmatch(r"[\w.-]+", pattern):
            found = self.word(pattern)[0]
        return (found, False) if found else (today, True)

    def _then(self, words: str | list[str]) -> list[str]:
        return next((hits for table in self.old if (hits := [p for p, then in table.items() if matches(words, then)])), [])

    def once_more(self, word: str) -> list[str]:
        """Paths of layers that a name of today does not mean, and meant in older releases."""
        today = set(self.word(word)[0])
        return [p for p in self._then([word]) if p not in today and places(self.modules[p])]

    def why_nothing(self, word: str) -> str:
        """Why a word means nothing, if it is a role word; the nearest names; the names there are."""
        fused = fused_with(word, self.roles) if word in WORDS else []
        if fused:
            one = next(r for r in self.roles if r.path == fused[0])
            held = ", ".join(h.rpartition(".")[2] for h in one.holds)
            return f" This model has it only inside fused layers ({fused[0]} is {held} in one); name {one.role!r} or the layer itself."
        whole = next((p for p, m in self.modules.items() if "." in word and matches([word.rpartition(".")[0]], p) and places(m)), None)
        if whole is not None and not any(p.startswith(whole + ".") for p in self.parts):
            return f" {whole} has no known parts; where it is a fused projection, say where they lie, such as fused_layouts={{{word.rpartition('.')[0]!r}: ['q', 'k', 'v']}}."
        leaves = list(dict.fromkeys(p.rpartition(".")[2] for p, m in self.modules.items() if places(m)))
        leaves += dict.fromkeys(".".join(p.split(".")[-2:]) for p in self.parts)
        numbered = [n for n in leaves if not n.isdigit()] or leaves
        if not leaves:
            return " The model has no layer of a supported kind."
        then = {t.rpartition(".")[2] for table in self.old for t in table.values()}
        near = suggest(word, numbered) or suggest(word.rpartition(".")[2], dict.fromkeys([*numbered, *then])) or suggest(word, WORDS)
        roles_here = f" Role words here: {', '.join(self.role_words)}." if self.role_words else ""
        return f"{near} Layers that can be adapted are called: {', '.join(numbered[:12])}{' …' if len(numbered) > 12 else ''}.{roles_here}"

    def own_role(self, word: str) -> list[str]:
        """Paths of the layers whose role is this word itself, not a narrower one."""
        return [r.path for r in self.roles if r.role == word]

    @property
    def role_words(self) -> list[str]:
        """The role words that mean something here."""
        return [w for w, role in WORDS.items() if w == role and with_role(w, self.roles)]


def exactly(paths: Iterable[str], every: Iterable[str]) -> list[str] | str:
    """The shortest names that mean these modules and no others; a regular expression where no names do.

    >>> exactly(["a.q", "b.q"], ["a", "a.q", "b", "b.q", "c"]), exactly(["a.q"], ["a.q", "b.q"])
    (['q'], ['a.q'])
    """
    chosen = set(paths)
    ends: dict[str, bool] = {}
    for path in every:
        parts = path.split(".")
        for i in range(len(parts)):
            end = ".".join(parts[i:])
            ends[end] = ends.get(end, True) and path in chosen
    names = []
    for path in paths:
        parts = path.split(".")
        short = [e for i in reversed(range(len(parts))) if ends[e := ".".join(parts[i:])]]
        if not short:
            return "|".join(re.escape(p) for p in paths)
        names.append(short[0])
    return sorted(set(names))


def named_patterns(config: PeftConfig, naming: Naming, paths: list[str]) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` with keys of today in place of older names and role words; only those that change.

    Raises:
        TargetError: a key that means none of the adapted layers.
    """
    changed = {}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name, None) or {}
        new: dict[str, Any] = {}
        for key, value in patterns.items():
            if isinstance(value, list) or any(re.match(rf"(.*\.)?({key})$", p) for p in paths):
                new[key] = value
                continue
            meant = [p for p in naming.meant([key])[0] if p in paths]
            if not meant:
                raise TargetError(f"{name}: {key!r} matches none of the adapted layers.{naming.why_nothing(key)}")
            new |= {f"^{re.escape(p)}": value for p in meant if not any(re.match(rf"(.*\.)?({k})$", p) for k in new)}
        if new != patterns:
            changed[name] = new
    return changed
