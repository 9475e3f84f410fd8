"""The errors that Veneer raises: few, named, with one base class.

A message says what, where, why and what to do. The built-in class beside `VeneerError` keeps `except ValueError` working for callers who
know nothing of Veneer. `suggest` is the one place that turns a misspelt name into "did you mean".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """Base class of every error that Veneer raises on purpose."""


class ConfigError(VeneerError, ValueError):
    """A configuration value or key that cannot be used."""


class TargetError(VeneerError, ValueError):
    """A target name that matches nothing, or a layer that cannot be adapted."""


class AdapterFileError(VeneerError, ValueError):
    """An adapter directory that is incomplete, misshapen, or of another model."""


class StateError(VeneerError, RuntimeError):
    """A call that the model's present state does not allow."""


class DataError(VeneerError, ValueError):
    """Pictures or labels that cannot be trained on or read."""


class VeneerWarning(UserWarning):
    """Base class of Veneer's warnings."""


def suggest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Return `' Did you mean "…"?'` for the nearest of `known`, or `''` when none is near.

    >>> suggest("lora_alhpa", ["lora_alpha", "r"])
    ' Did you mean "lora_alpha"?'
    """
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=0.6)
    return " Did you mean " + " or ".join(f'"{n}"' for n in near) + "?" if near else ""
