"""The vocabulary of roles, and how a module's name is read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.output")
MLP = ("mlp.up", "mlp.gate", "mlp.down")
WORDS = {"mlp.in": "mlp.up", "mlp.out": "mlp.down"} | {w: w for w in ("attention", *ATTENTION, "mlp", *MLP)}
"""Every role word → the role it means; `attention` and `mlp` mean all of theirs."""


@dataclass(frozen=True)
class Role:
    """What one layer does.

    Args:
        path: of the layer.
        role: one of `WORDS`; just `attention` or `mlp` for a layer that does several things, or another thing in there.
        holds: what a fused layer does at once.
        called: whether it is a layer that its parent calls; False for `nn.MultiheadAttention`, which reads its weights itself.
    """

    path: str
    role: str
    holds: tuple[str, ...] = ()
    called: bool = True


def up(path: str, levels: int) -> str | None:
    parts = path.split(".")
    return ".".join(parts[:-levels]) if len(parts) >= levels else None


def is_called(path: str, module: nn.Module, *words: str) -> bool:
    own = {path.rpartition(".")[2].lower(), *(c.__name__.lower() for c in type(module).__mro__ if c is not nn.Module)}
    return any(w in name for w in words for name in own)


def of_part(path: str, fused: Role) -> str | None:
    """What one part of a fused layer does; None where its name says nothing."""
    names = {"q": ATTENTION[0], "k": ATTENTION[1], "v": ATTENTION[2], "up": MLP[0], "gate": MLP[1], "input": MLP[0]}
    role = names.get(path.rpartition(".")[2])
    return role if role in fused.holds else None
