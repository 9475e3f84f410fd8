"""The algebra: small structured matrices that an adapter's equation is made of.

Names are resolved on first use, so a method file can say `from veneer import operators as op` and still be read (for its configuration,
its facts) without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapted import Adapted, FrozenMap, compose, row_norms
    from .base import Cost, Operator, Sum, stack
    from .dense import Dense
    from .diagonal import Diagonal
    from .low_rank import LowRank

_HOME = {
    "Adapted": "adapted",
    "FrozenMap": "adapted",
    "compose": "adapted",
    "row_norms": "adapted",
    "Cost": "base",
    "Operator": "base",
    "Sum": "base",
    "stack": "base",
    "Dense": "dense",
    "Diagonal": "diagonal",
    "LowRank": "low_rank",
}

__all__ = ["Adapted", "Cost", "Dense", "Diagonal", "FrozenMap", "LowRank", "Operator", "Sum", "compose", "row_norms", "stack"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer.operators' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value
