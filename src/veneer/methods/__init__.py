"""One file per method: its configuration, its facts and its equation.

`discover` imports every file of this package; there is no list to keep.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module


@cache
def discover() -> tuple[str, ...]:
    """Import every method file, which registers its configuration; the names, sorted."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    for name in names:
        import_module(f"{__name__}.{name}")
    return tuple(names)
