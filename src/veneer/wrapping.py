"""The shell of a wrapped model: the place in the tree that gives parameters their public names, and a class that carries the base's signature."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


class AdaptedModel(nn.Module):
    """The base model, adapted; its place in the tree gives parameters the names that the public format has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


_WITH_SIGNATURE: dict[tuple[type, type], type] = {}


def with_signature(cls: type[nn.Module], base: type[nn.Module]) -> type[Any]:
    """The subclass of `cls` whose forward has the signature of `base`'s; the same one at every call."""
    key = (cls, base)
    if key not in _WITH_SIGNATURE:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return cls.forward(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]  # inspect reads it
        namespace = {
            "__module__": __name__,
            "__doc__": cls.__doc__,
            "__qualname__": f"{cls.__name__}Of{base.__name__}",
            "forward": forward,
            "WRAPPER": cls,
        }
        # The plain name, because pipelines look it up among the names of models that they know.
        _WITH_SIGNATURE[key] = type(cls.__name__, (cls,), namespace)
    return _WITH_SIGNATURE[key]
