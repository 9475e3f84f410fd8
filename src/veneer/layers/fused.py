"""Modules that take a fused path in evaluation, past the forward of their own layers, and so past every adapter.

`nn.TransformerEncoderLayer` hands its children's weights to one kernel when it is in eval mode and nothing requires grad. Its flag for "my activation is one that
the kernel knows" is the only switch that costs nothing else; without it the layer calls its children.
"""

from __future__ import annotations

from torch import nn

from .swap import Swapped, own_modules

_FLAG = "activation_relu_or_gelu"


def hold_open(model: nn.Module) -> dict[str, int]:
    """Make modules with an adapted child call it; returns what `release` needs, by path."""
    before = {}
    for path, module in own_modules(model):
        if (
            isinstance(module, nn.TransformerEncoderLayer)
            and any(isinstance(m, Swapped) for _, m in own_modules(module))
            and getattr(module, _FLAG)
        ):
            before[path] = getattr(module, _FLAG)
            setattr(module, _FLAG, 0)
    return before


def release(model: nn.Module, before: dict[str, int]) -> None:
    """Undo `hold_open`."""
    for path, value in before.items():
        setattr(model.get_submodule(path), _FLAG, value)
