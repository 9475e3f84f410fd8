"""Attributes that are lent to a module: they answer where the module's own class, and the module itself, have nothing of that name.

An adapted layer keeps its class, so code written for wrapped layers has to find its `lora_A`, `scaling` or `set_adapter` on the layer, and a mixture
of experts that has a `scaling` of its own must keep that.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class Lent:
    """One lent attribute.

    Args:
        answer: its value for a module; it may raise AttributeError.
    """

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.answer, self.name = answer, ""
        self.__doc__ = answer.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        if any(self.name in module.__dict__.get(kept, ()) for kept in ("_parameters", "_buffers", "_modules")):
            raise AttributeError(self.name)  # nn.Module's own __getattr__ is asked next
        for cls in type(module).__mro__:
            own = cls.__dict__.get(self.name, self)
            if not isinstance(own, Lent):
                return own.__get__(module, type(module)) if hasattr(own, "__get__") else own
        return self.answer(module)


def lent_method(function: Callable[..., Any]) -> Lent:
    """A function as a lent method."""

    def bound(module: nn.Module) -> Any:
        return MethodType(function, module)

    bound.__doc__ = function.__doc__
    return Lent(bound)
