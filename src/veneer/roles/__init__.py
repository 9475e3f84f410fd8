"""What each linear layer does in its block, told by names and shapes of siblings, so that `attention.query` means the same in every architecture.

Queries, keys and values have the same shapes, so only their names tell them apart; but no list of names is needed: three siblings whose names
differ in nothing but q, k and v are an attention. Everything else follows from shapes: the layer that leads back from what q, k and v lead to
is the output, a layer that widens before one that narrows by as much is a feed-forward's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..layers import is_linear, places
from .attention import attention
from .feed_forward import feed_forward
from .role import WORDS, Role, of_part

__all__ = ["WORDS", "Role", "fused_with", "query_and_value", "roles", "with_role"]


def roles(modules: Mapping[str, nn.Module], heads: list[str], parts: Mapping[str, str] | None = None) -> list[Role]:
    """The role of every layer that has one, in the model's order, and after them those of the parts of fused layers.

    Args:
        modules: of the model, by path.
        parts: paths of the parts of fused layers → path of the module that holds the layer's weight.
        heads: paths of modules that are the model's heads; those without attention have no roles.
    """
    forms = {p: places(m)[0].kind.form(m) for p, m in modules.items() if is_linear(m)}
    found = {r.path: r for r in attention(modules, forms)}
    plain = [h for h in heads if not any(p.startswith(h + ".") for p in found)]
    free = {p: f for p, f in forms.items() if p not in found and not any(p == h or p.startswith(h + ".") for h in plain)}
    found |= {r.path: r for r in feed_forward(modules, free)}
    of_parts = [Role(p, role) for p, module in (parts or {}).items() if module in found and (role := of_part(p, found[module])) is not None]
    return [*(found[p] for p in modules if p in found), *of_parts]


def with_role(word: str, known: list[Role]) -> list[str]:
    """Paths of the layers that a role word means; a part inside a layer that is meant itself is left out."""
    role = WORDS[word]
    hits = [r.path for r in known if r.role == role or r.role.startswith(role + ".")]
    return [p for p in hits if not any(p.startswith(h + ".") for h in hits)]


def fused_with(word: str, known: list[Role]) -> list[str]:
    """Paths of the layers that do what a role word says together with other things."""
    return [r.path for r in known if WORDS[word] in r.holds and not _in_parts(r, known)]


def query_and_value(known: list[Role]) -> list[str]:
    """What is adapted where nothing was named: queries and values, or the fused layers that hold them."""
    fused = [r for r in known if "attention.query" in r.holds and not _in_parts(r, known)]
    own = [*with_role("attention.query", known), *with_role("attention.value", known), *(r.path for r in fused if r.called)]
    wanted = own or [r.path for r in fused]
    return [r.path for r in known if r.path in wanted]


def _in_parts(fused: Role, known: list[Role]) -> bool:
    """Whether the parts of a fused layer have roles of their own."""
    return any(r.path.startswith(fused.path + ".") and r.role in fused.holds for r in known)
