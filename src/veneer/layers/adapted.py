"""Attach in place by class swap: a module's class becomes a cached subclass that evaluates equations.

The module, its class by `isinstance`, its parameter names and its state-dict keys stay; the adapters live in one child module called
`veneer`. The alternative, wrapping the layer in another module, renames every base weight, and then each feature that knows layer names must learn
two spellings. A layer that is called evaluates in its forward (`AdaptedLayer`); a weight that its module reads itself is a property
that gives W' (`AdaptedParameters`).
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..engine import evaluate, merged_bias, merged_matrix
from ..errors import TargetError
from ..operators import Adapted, ByRows
from . import merged as weights
from . import views
from .adapter import Share
from .base import LayerKind
from .frozen import Frozen
from .lent import Lent, lent_method
from .mixed import by_adapter, check_reader, mixed_layer, running, stacked
from .parts import PartKind
from .swap import ADAPTERS, Swapped, swap, swap_back

if TYPE_CHECKING:
    from ..methods.base import Noise


class AdaptedModule(Swapped):
    """What every module with adapted weights has."""

    ATTRIBUTES: ClassVar[dict[str, Any]] = Swapped.ATTRIBUTES | {
        "veneer_kinds": {},
        "veneer_parts": {},
        "veneer_merged": {},
        "veneer_merged_names": (),
        "veneer_reached": False,
    }

    veneer_kinds: dict[str, LayerKind]
    """The kind of each adapted weight, by its name."""
    veneer_parts: dict[str, PartKind]
    """The kind of each adapted part of a weight, by its slot."""
    veneer_merged: dict[str, nn.Parameter]
    """The original parameters while adapters are merged, by name."""
    veneer_merged_names: tuple[str, ...]
    """The adapters that are merged."""
    veneer_reached: bool

    adapter_state_dict_load_map = lent_method(views.file_names)
    r = Lent(views.ranks)
    lora_alpha = Lent(views.alphas)
    alpha = Lent(views.alphas)
    scaling = Lent(views.Scaling)
    set_scale = lent_method(views.weigh)
    scale_layer = lent_method(views.scale_layer)
    unscale_layer = lent_method(views.unscale_layer)
    adapter_layer_names = Lent(views.heads_of)
    base_layer = Lent(views.base_layer)
    get_base_layer = lent_method(views.base_layer)
    merge = lent_method(weights.merge)
    unmerge = lent_method(weights.unmerge)
    get_delta_weight = lent_method(weights.get_delta_weight)
    merged = Lent(lambda self: bool(self.veneer_merged))
    merged_adapters = Lent(lambda self: list(self.veneer_merged_names))

    def adapters(self, tensor: str) -> Iterator[Share]:
        """The active adapters of one weight, and of its parts."""
        for name in running(self):
            for _, adapter in self._adapters_of(self.at(name), tensor):
                yield adapter

    def at(self, name: str) -> Mapping[str, Share]:
        """One adapter's share of this module, by slot, whether it is attached or packed; empty where it has none."""
        held = self._modules[ADAPTERS]._modules.get(name)  # type: ignore[union-attr]  # not by getattr, which looks in three places first
        if held is not None:
            return held._modules  # type: ignore[return-value]  # Adapters
        packed = None if self.veneer_record is None else self.veneer_record.shelf.fetch(name)
        return {} if packed is None else packed.at(self)

    def _adapters_of(self, found: Mapping[str, Share], tensor: str) -> Iterator[tuple[LayerKind, Share]]:
        for slot, kind in [(tensor, self.veneer_kinds[tensor]), *self.veneer_parts.items()]:
            if kind.tensor == tensor and slot in found:
                yield kind, found[slot]

    def equation_of(self, name: str, tensor: str) -> Adapted | ByRows | None:
        """One adapter's equation of one weight; None where it has none."""
        return self.equation_of_all([self.at(name)], tensor)

    def equation_of_all(self, alike: Sequence[Mapping[str, Share]], tensor: str) -> Adapted | ByRows | None:
        """The equation of one weight of several adapters that are alike, as one stack, from what `at` says of each."""
        parts = []
        for slot, kind in [(tensor, self.veneer_kinds[tensor]), *self.veneer_parts.items()]:
            if kind.tensor != tensor or slot not in alike[0]:
                continue
            values = alike[0][slot].values() if len(alike) == 1 else stacked([found[slot] for found in alike])
            equation = alike[0][slot].method.equation(Adapted(Frozen(kind, self)), values)
            if not isinstance(kind, PartKind):
                return equation
            parts.append((kind.rows, equation))
        return ByRows(Frozen(self.veneer_kinds[tensor], self), tuple(parts)) if parts else None

    def equations(self, tensor: str) -> list[tuple[Adapted | ByRows, Noise]]:
        """The active adapters' equations of one weight, each with what is disturbed while training."""
        found = []
        for name in running(self):
            own = self.at(name)
            equation = self.equation_of_all([own], tensor)
            if equation is not None:
                found.append((equation, next(self._adapters_of(own, tensor))[1].method.noise))
        return found


class AdaptedLayer(AdaptedModule):
    """Mixed in before the class of a layer that is called."""

    PREFIX: ClassVar[str] = "Adapted"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and not self.veneer_reached:
            self.veneer_reached = True
        batch = self.veneer_record.batches.current()
        if batch is not None:
            return mixed_layer(self, batch, *args, **kwargs)
        if not self.veneer_active or self.veneer_merged:
            return self.base_forward(*args, **kwargs)
        return evaluate(self, *args, **kwargs)


class AdaptedParameters(AdaptedModule):
    """Mixed in before the class of a module that reads its weights itself; each adapted one becomes a property (see `adapt`)."""

    PREFIX: ClassVar[str] = "Parametrised"
    ATTRIBUTES: ClassVar[dict[str, Any]] = AdaptedModule.ATTRIBUTES | {"veneer_cache": None}

    veneer_cache: dict[str, Tensor] | None
    """W' by name, within one forward; modules read a weight once per expert, or several times to look at its type."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.veneer_record.batches.current()
        if batch is not None and batch.single is None:
            return by_adapter(self, self.forward, batch, args, kwargs)
        self.veneer_cache = {}
        try:
            return self.base_forward(*args, **kwargs)
        finally:
            self.veneer_cache = None

    @classmethod
    def member(cls, name: str) -> property:
        """The property that stands for an adapted weight."""
        return property(lambda self: self.adapted_weight(name))

    def adapted_weight(self, tensor: str) -> Tensor:
        """W' of the active adapters in the module's own shape, or the parameter itself."""
        own = self._parameters[tensor]
        assert own is not None
        check_reader(self)
        if not torch.compiler.is_compiling():
            self.veneer_reached = True
        if tensor in self.veneer_merged:
            return own
        if self.veneer_cache is not None and tensor in self.veneer_cache:
            return self.veneer_cache[tensor]
        value: Tensor = own
        for name, kind in self.veneer_kinds.items():
            if tensor in (name, kind.offset) and next(self.adapters(name), None) is not None:
                found = merged_bias(self, name) if tensor == kind.offset else kind.to_weight(self, merged_matrix(self, name))
                assert found is not None
                value = found.to(own.dtype)
        if self.veneer_cache is not None:
            self.veneer_cache[tensor] = value
        return value


def adapt(module: nn.Module, kind: LayerKind, path: str) -> AdaptedModule:
    """Make one weight of a module adaptable in place; nothing else about it changes.

    Raises:
        TargetError: something replaced this one layer's `forward`, so a new class would not be asked.
    """
    if isinstance(module, AdaptedModule) and kind.tensor in module.veneer_kinds:
        pass
    elif kind.called:
        hooked = rebindable(module, path)
        swap(module, AdaptedLayer)
        if hooked:
            _rebind(module)
    else:
        own = [n for n in (kind.tensor, kind.offset) if n and module._parameters.get(n) is not None]
        swap(module, AdaptedParameters, *own)
    assert isinstance(module, AdaptedModule)
    module.veneer_kinds.setdefault(kind.tensor, kind.whole)
    if isinstance(kind, PartKind):
        module.veneer_parts[kind.slot] = kind
    return module


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
