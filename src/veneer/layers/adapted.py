"""Attach in place by class swap: a layer's class becomes a cached subclass that evaluates equations.

The layer object, its class by `isinstance`, its parameter names and its state-dict keys stay; the adapters live in one child module called
`veneer`. The alternative, wrapping the layer in another module, renames every base weight, and then each feature that knows layer names must learn
two spellings.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine import evaluate
from ..errors import TargetError
from ..operators import Adapted
from .base import LayerKind
from .kinds import kind_of, why_not
from .swap import Swapped, swap, swap_back

if TYPE_CHECKING:
    from ..methods.base import Method


class Adapter(nn.Module):
    """One adapter of one layer: a method, and the parameters that its equation reads."""

    def __init__(self, method: Method, layer: AdaptedLayer, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.method = method
        weight = layer.veneer_kind.matrix(layer)
        dtype = dtype or weight.dtype
        for spec in method.parameters(*layer.veneer_kind.shape(layer)):
            value = torch.empty(spec.shape, dtype=dtype, device=weight.device)
            with torch.no_grad():
                spec.init(value)
            self.register_parameter(spec.name, nn.Parameter(value))
        if not weight.is_meta:
            with torch.no_grad():
                method.finish(Adapted(Frozen(layer)), self)

    def equation(self, W: Adapted) -> Adapted:
        """W' from W with this adapter's parameters."""
        return self.method.equation(W, self)

    def keys(self, layer: AdaptedLayer) -> dict[str, nn.Parameter]:
        """The parameters by their name in the adapter file."""
        return {s.key: getattr(self, s.name) for s in self.method.parameters(*layer.veneer_kind.shape(layer))}

    def extra_repr(self) -> str:
        return repr(self.method)


class Frozen:
    """An adapted layer's own weight, as the linear map W of an equation."""

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer = layer

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.veneer_kind.shape(self.layer)

    def dense(self) -> Tensor:
        return self.layer.veneer_kind.matrix(self.layer).detach()


class AdaptedLayer(Swapped):
    """Mixed in before a layer's own class; see `adapt`."""

    PREFIX: ClassVar[str] = "Adapted"
    ATTRIBUTES: ClassVar[dict[str, Any]] = {"veneer_active": (), "veneer_merged": None, "veneer_reached": False, "veneer_kind": None}

    veneer_kind: LayerKind
    veneer_merged: tuple[nn.Parameter] | None
    """The original weight while adapters are merged; in a tuple, so that it is no parameter of the layer."""
    veneer_reached: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.veneer_reached = True
        if not self.veneer_active or self.veneer_merged is not None:
            return self.base_forward(*args, **kwargs)
        return evaluate(self, *args, **kwargs)

    def adapters(self) -> Iterator[Adapter]:
        """The active adapters."""
        for name in self.veneer_active:
            adapter = self.veneer[name]
            assert isinstance(adapter, Adapter)
            yield adapter

    def equations(self) -> list[tuple[Adapted, float]]:
        """The active adapters' equations, each with its dropout probability."""
        W = Adapted(Frozen(self))
        return [(a.equation(W), a.method.dropout) for a in self.adapters()]


def adapt(layer: nn.Module, path: str) -> AdaptedLayer:
    """Make `layer` adaptable in place; nothing else about it changes.

    Raises:
        TargetError: the layer is of no supported kind, or something replaced this one layer's `forward`, so a new class would not be asked.
    """
    if isinstance(layer, AdaptedLayer):
        return layer
    kind = kind_of(layer)
    if kind is None:
        raise TargetError(f"{path} {why_not(layer)}")
    hooked = rebindable(layer, path)
    swap(layer, AdaptedLayer)
    assert isinstance(layer, AdaptedLayer)
    layer.veneer_kind = kind
    if hooked:
        _rebind(layer)
    return layer


def restore(module: Swapped) -> None:
    """Give a module back its own class and attributes."""
    swap_back(module)
    if "_old_forward" in module.__dict__:
        _rebind(module)


def _rebind(layer: nn.Module) -> None:
    layer.__dict__["_old_forward"] = types.MethodType(type(layer).forward, layer)


def rebindable(layer: nn.Module, path: str) -> bool:
    """Whether an instance-level `forward` was put there by accelerate's hooks, whose inner forward can be bound anew.

    Raises:
        TargetError: it was put there by something else.
    """
    if "forward" not in layer.__dict__:
        return False
    if "_hf_hook" in layer.__dict__ and "_old_forward" in layer.__dict__:
        return True
    raise TargetError(
        f"{path}: the forward of this one {type(layer).__name__} object was replaced ({layer.__dict__['forward']!r}), so an adapter would never "
        "run; remove that replacement (`del layer.forward`), attach the adapter, and put it back"
    )
