"""The algebra: small structured matrices that an adapter's equation is made of.

Names are resolved on first use, so a method file can say `from veneer import operators as op` and still be read (for its configuration,
its facts) without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapted import Adapted, FrozenMap, compose, rotate, row_norms, wider
    from .base import NUMBERS_IN_CACHE, Cost, Operator, cast, pieces, stack, traced
    from .block_diagonal import BlockDiagonal, Butterfly
    from .by_rows import ByRows
    from .dense import Dense
    from .diagonal import Diagonal
    from .hadamard import Hadamard
    from .kronecker import Kronecker
    from .low_rank import LowRank
    from .products import IdentityPlus, Product
    from .rotations import cayley, cayley_neumann, orthonormal, reflections, skew, within
    from .rows import FromRows, IntoRows, Rows
    from .sums import Sum
    from .truncation import Spectrum, truncated, widest

_HOME = {
    "adapted": ["Adapted", "FrozenMap", "compose", "rotate", "row_norms", "wider"],
    "base": ["NUMBERS_IN_CACHE", "Cost", "Operator", "cast", "pieces", "stack", "traced"],
    "by_rows": ["ByRows"],
    "block_diagonal": ["BlockDiagonal", "Butterfly"],
    "dense": ["Dense"],
    "diagonal": ["Diagonal"],
    "hadamard": ["Hadamard"],
    "kronecker": ["Kronecker"],
    "low_rank": ["LowRank"],
    "products": ["IdentityPlus", "Product"],
    "rotations": ["cayley", "cayley_neumann", "orthonormal", "reflections", "skew", "within"],
    "rows": ["FromRows", "IntoRows", "Rows"],
    "sums": ["Sum"],
    "truncation": ["Spectrum", "truncated", "widest"],
}
_FILE = {name: file for file, names in _HOME.items() for name in names}

__all__ = [
    "NUMBERS_IN_CACHE",
    "Adapted",
    "BlockDiagonal",
    "Butterfly",
    "ByRows",
    "Cost",
    "Dense",
    "Diagonal",
    "FromRows",
    "FrozenMap",
    "Hadamard",
    "IdentityPlus",
    "IntoRows",
    "Kronecker",
    "LowRank",
    "Operator",
    "Product",
    "Rows",
    "Spectrum",
    "Sum",
    "cast",
    "cayley",
    "cayley_neumann",
    "compose",
    "orthonormal",
    "pieces",
    "reflections",
    "rotate",
    "row_norms",
    "skew",
    "stack",
    "traced",
    "truncated",
    "wider",
    "widest",
    "within",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module 'veneer.operators' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_FILE[name]}", __name__), name)
    return value
