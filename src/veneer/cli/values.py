"""A flag's text as a value of its setting's type.

YAML alone would guess: a run named 5 would be a number, one named `no` would be False and one named 2026-11-21 a date. The setting's type says which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml


def kinds(hint: Any) -> set[Any]:
    """The plain types that a type hint allows, None apart; the choices of a literal count as text.

    >>> sorted(k.__name__ for k in kinds(str | list[int] | None))
    ['list', 'str']
    """
    if get_origin(hint) in (Union, UnionType):
        return set().union(*(kinds(h) for h in get_args(hint)))
    if get_origin(hint) is Literal:
        return {str}
    return {get_origin(hint) or hint} - {NoneType}


def reader(hint: Any) -> Callable[[str], Any]:
    """What turns a flag's text into a value: text as it is, lists as `a,b`, everything else as in a YAML file; a wrong type is left to the schema.

    >>> reader(str | None)("5"), reader(float)("5e-3"), reader(list[str])("a"), reader(str | list[str] | None)("a,b")
    ('5', 0.005, ['a'], ['a', 'b'])
    """
    allowed = kinds(hint)
    if allowed <= {str, Path}:
        return str

    def read(text: str) -> Any:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            return text
        if not isinstance(value, str):
            return value if value is None or list not in allowed or isinstance(value, list) or type(value) in allowed else [value]
        if list in allowed and not any(c in value for c in "()[]{}\\*"):
            parts = [part.strip() for part in value.split(",") if part.strip()]
            return parts if len(parts) > 1 or str not in allowed else value
        return _number(value) if str not in allowed else value

    return read


def _number(text: str) -> Any:
    """YAML leaves 5e-3 a string, because it has no dot."""
    try:
        return float(text)
    except ValueError:
        return text


def placeholder(hint: Any) -> str:
    """What stands for the value in the help: its choices, N for a number, A,B for a list.

    >>> placeholder(Literal["a", "b"]), placeholder(int | None), placeholder(list[str]), placeholder(str)
    ('{a,b}', 'N', 'A,B', 'TEXT')
    """
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    allowed = kinds(hint)
    if allowed <= {int, float}:
        return "N"
    return "A,B" if list in allowed else "PATH" if allowed == {Path} else "TEXT" if str in allowed else "VALUE"
