"""What other code of the field reads on an adapted layer: one adapter's numbers and tensors, in dictionaries by adapter name.

Nothing is copied: `layer.lora_A["default"].weight` is the adapter's own parameter, and writing `layer.scaling["default"]` changes the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .lent import Lent
from .swap import ADAPTERS, unadapted
from .switches import held_adapters

if TYPE_CHECKING:
    from .adapted import AdaptedModule
    from .adapter import Adapter


def adapters_by_name(module: AdaptedModule) -> dict[str, Adapter]:
    """The adapter of the first weight that each adapter has in a module, by its name."""
    return {name: next(iter(held.children())) for name, held in module.veneer.items()}  # type: ignore[misc]  # Adapters


class Scaling(MutableMapping[str, float]):
    """The scale of each adapter of one layer.

    Args:
        module: the layer.
    """

    def __init__(self, module: AdaptedModule) -> None:
        self._module = module

    def _scaled(self) -> dict[str, Adapter]:
        return {n: a for n, a in adapters_by_name(self._module).items() if a.method.scale is not None}

    def __getitem__(self, name: str) -> float:
        scale = self._scaled()[name].method.scale
        assert scale is not None
        return scale

    def __setitem__(self, name: str, scale: float) -> None:
        first = self._scaled()[name].first_scale
        assert first is not None
        weigh(self._module, name, scale / first)

    def __delitem__(self, name: str) -> None:
        raise TypeError("an adapter keeps its scale; delete_adapter takes the whole adapter off")

    def __iter__(self) -> Iterator[str]:
        return iter(self._scaled())

    def __len__(self) -> int:
        return len(self._scaled())


def weigh(module: AdaptedModule, name: str, weight: float) -> None:
    """Multiply one adapter's scale, as it was at first, with `weight`, for every weight of a module."""
    if name in module.veneer:
        for adapter in module.veneer[name].children():
            adapter.weigh(weight)  # type: ignore[operator]  # an Adapter


def scale_layer(self: AdaptedModule, scale: float) -> None:
    """Multiply the scale of every active adapter."""
    for name in held_adapters(self):
        weigh(self, name, adapters_by_name(self)[name].weight * scale)


def unscale_layer(self: AdaptedModule, scale: float | None = None) -> None:
    """Divide the scale of every active adapter, or put it back to what it was at first."""
    for name in held_adapters(self):
        weigh(self, name, 1.0 if scale is None else adapters_by_name(self)[name].weight / scale)


def ranks(module: AdaptedModule) -> dict[str, int]:
    """The rank of each adapter that has one; 0 for one that has none, so that adapters can be counted."""
    return {n: a.method.rank or 0 for n, a in adapters_by_name(module).items()}


def alphas(module: AdaptedModule) -> dict[str, float]:
    """α of each adapter that has one: its scale at first, times what the format divides α by."""
    configs = module.veneer_record.configs
    found = {}
    for name, a in adapters_by_name(module).items():
        if a.first_scale is not None and a.method.rank:
            stabilised = getattr(configs.get(name), "use_rslora", False)
            found[name] = a.first_scale * (a.method.rank**0.5 if stabilised else a.method.rank)
    return found


class Named:
    """Tensors under the names that follow an adapter's in the format, such as `weight`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.__dict__.update(tensors)

    def __repr__(self) -> str:
        return f"Named({', '.join(f'{n}={tuple(t.shape)}' for n, t in self.__dict__.items())})"


# What the format's usual reader keeps as a module with a weight, and its files name without one.
_WITH_WEIGHT = {"lora_magnitude_vector"}


def heads_of(module: AdaptedModule) -> tuple[str, ...]:
    """The first parts of the names of the tensors that a module's adapters have in the file, such as `lora_A`."""
    found = [s.key.partition(".")[0] for a in adapters_by_name(module).values() for s in a.specs if s.key]
    return tuple(dict.fromkeys(found))


def tensors_of(module: AdaptedModule, head: str) -> dict[str, Any]:
    """The tensors called `head` of each adapter: a tensor, or what holds its tensors by the rest of their names."""
    found: dict[str, Any] = {}
    for name, adapter in adapters_by_name(module).items():
        if len(list(module.veneer[name].children())) > 1:
            continue  # several weights, or parts of one, have tensors of the same names
        own = {s.key: getattr(adapter, s.name) for s in adapter.specs if s.key.partition(".")[0] == head}
        if head in own and head not in _WITH_WEIGHT:
            found[name] = own[head]
        elif own:
            found[name] = Named({key.partition(".")[2] or "weight": t for key, t in own.items()})
    return found


def file_names(self: AdaptedModule, adapter_name: str) -> dict[str, str]:
    """The names in the file → those in the model, of one adapter's tensors in this module and below, both relative to this module."""
    own = next((a.place[1] for a in adapters_by_name(self).values()), "")
    # The format's other writer keeps the module's own tensors one level below: trained biases, and embeddings beside their adapter.
    found = {f"{own}.base_layer.{n}": f"{own}.{n}" for n, p in self._parameters.items() if p is not None}
    for module in self.modules():
        held = getattr(module, ADAPTERS, {})
        for tensor, adapter in held[adapter_name]._modules.items() if adapter_name in held else ():
            if hasattr(adapter, "named"):
                found |= adapter.named(adapter_name, tensor)
    return {
        k.removeprefix(f"{own}."): n.removeprefix(f"{own}.")
        for k, n in found.items()
        if k.startswith(f"{own}.") and n.startswith(f"{own}.")
    }


class _Tensors:
    """The answer of the lent attribute of one name."""

    def __init__(self, head: str) -> None:
        self.head = head

    def __call__(self, module: AdaptedModule) -> dict[str, Any]:
        found = tensors_of(module, self.head)
        if not found:
            raise AttributeError(self.head)
        return found


def lend_tensors(cls: type, module: AdaptedModule) -> None:
    """Let the modules of a class answer to the names of this module's tensors; a module that has none of a name is asked in vain."""
    for head in heads_of(module):
        if head not in cls.__dict__:
            lent = Lent(_Tensors(head))
            lent.name = head
            setattr(cls, head, lent)


def base_layer(module: AdaptedModule) -> nn.Module:
    """The layer without adapters, as a module of its own class that has the same parameters."""
    if "_hf_hook" in module.__dict__:
        raise AttributeError(
            "base_layer of a layer with accelerate's hooks; remove the hooks first (accelerate.hooks.remove_hook_from_module)"
        )
    return unadapted(module)
