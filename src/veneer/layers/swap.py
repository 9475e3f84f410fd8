"""Class swap: give one module object new behaviour by a cached subclass of its own class.

As `torch.nn.utils.parametrize` and FSDP2 do. The subclass is made once per class, so `torch.compile` sees one type, and objects of it can be pickled
and deep-copied although it has no name to import.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from . import switches
from .lent import Lent, lent_method

ADAPTERS = "veneer"
"""The name of the child module that holds a module's adapters."""

_SUBCLASSES: dict[tuple[type, type, tuple[str, ...]], type] = {}

_OWN_CLASSES: dict[type, type[nn.Module]] = {}


class Swapped(nn.Module):
    """Mixed in before a module's own class; what every swapped module has."""

    PREFIX: ClassVar[str]
    ATTRIBUTES: ClassVar[dict[str, Any]] = {"veneer_active": (), "veneer_record": None, "veneer_path": ""}
    """Plain attributes of a swapped module, with their first values."""
    MEMBERS: ClassVar[tuple[str, ...]] = ()
    """Names that the swapped class defines anew, by `member`."""

    veneer: nn.ModuleDict
    veneer_active: tuple[str, ...]
    veneer_record: Any
    """What is attached to the whole model (see `inject`)."""
    veneer_path: str
    """The module's path in the model."""

    set_adapter = lent_method(switches.set_adapter)
    enable_adapters = lent_method(switches.enable_adapters)
    delete_adapter = lent_method(switches.delete_adapter)
    active_adapters = Lent(switches.active_adapters)
    active_adapter = Lent(switches.active_adapters)
    disable_adapters = Lent(switches.disable_adapters)

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's own class."""
        return super().forward(*args, **kwargs)

    @classmethod
    def member(cls, name: str) -> Any:
        """What stands under one of `MEMBERS` in the swapped class."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin = next(c for c in type(self).__mro__ if c.__dict__.get("PREFIX") and "MEMBERS" not in c.__dict__)
        return _blank, (mixin, own_class(self), type(self).MEMBERS), self.__dict__.copy()


def _blank(mixin: type[Swapped], cls: type[nn.Module], members: tuple[str, ...]) -> nn.Module:
    new: Any = swapped_class(mixin, cls, members)
    return new.__new__(new)


def swapped_class(mixin: type[Swapped], cls: type[nn.Module], members: tuple[str, ...] = ()) -> type[Any]:
    """The subclass of `cls` with `mixin` in front of it."""
    key = (mixin, cls, members)
    if key not in _SUBCLASSES:
        namespace = {"__module__": __name__, "__doc__": cls.__doc__, "MEMBERS": members} | {m: mixin.member(m) for m in members}
        _SUBCLASSES[key] = type(f"{mixin.PREFIX}{cls.__name__}", (mixin, cls), namespace)
    return _SUBCLASSES[key]


def own_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without what is inside adapters, in a time that does not grow with their number.

    Args:
        every_name: a module under each of its paths, and not once.
    """
    seen: set[nn.Module] = set()

    def below(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if not every_name and module in seen:
            return
        seen.add(module)
        yield path, module
        for name, child in module._modules.items():
            if child is not None and not (name == ADAPTERS and isinstance(module, Swapped)):
                yield from below(child, f"{path}.{name}" if path else name)

    return below(model, "")


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters` without those inside adapters."""
    seen: set[nn.Parameter] = set()
    for path, module in own_modules(model):
        for name, p in module._parameters.items():
            if p is not None and p not in seen:
                seen.add(p)
                yield f"{path}.{name}" if path else name, p


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class a swapped module had; found by search, because FSDP2 puts a class of its own in front."""
    cls = type(module)
    found = _OWN_CLASSES.get(cls)
    if found is None:
        found = _OWN_CLASSES[cls] = next(c for c in cls.__mro__ if not issubclass(c, Swapped) and issubclass(c, nn.Module))
    return found


def unadapted(module: Swapped) -> nn.Module:
    """The module without adapters, as another object of its own class with the same parameters and submodules."""
    new = own_class(module).__new__(own_class(module))
    new.__dict__.update({k: v for k, v in module.__dict__.items() if k not in type(module).ATTRIBUTES})
    for kept in ("_parameters", "_buffers", "_modules"):
        new.__dict__[kept] = {k: v for k, v in module.__dict__[kept].items() if k != ADAPTERS}
    return new


def swap(module: nn.Module, mixin: type[Swapped], *members: str) -> None:
    """Change the module's class in place; a module that is swapped already gets further members."""
    if isinstance(module, mixin):
        members = tuple(dict.fromkeys([*type(module).MEMBERS, *members]))
        module.__class__ = swapped_class(mixin, own_class(module), members)
        return
    for name, value in mixin.ATTRIBUTES.items():
        module.__dict__[name] = copy.copy(value)
    module.add_module(ADAPTERS, nn.ModuleDict())
    module.__class__ = swapped_class(mixin, type(module), members)


def swap_back(module: Swapped) -> None:
    """Give the module back its own class and attributes."""
    own = own_class(module)
    for name in type(module).ATTRIBUTES:
        module.__dict__.pop(name)
    del module._modules[ADAPTERS]
    module.__class__ = own  # type: ignore[assignment]  # back to what it was
