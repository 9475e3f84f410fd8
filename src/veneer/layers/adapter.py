"""One adapter of one weight: a method, and the tensors that its equation reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..form import Form
from ..operators import Adapted
from .swap import ADAPTERS

if TYPE_CHECKING:
    from ..methods.base import Method, Parameter


class Values:
    """The tensors of one equation, as attributes."""


class Shared(nn.Module):
    """Constants that all layers of one adapter share; one module object, so that moving the model moves them once."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value, persistent=False)


class Share:
    """What one adapter has at one weight, however its tensors are kept; they are attributes by their names."""

    method: Method
    form: Form
    shared: Shared | None
    specs: list[Parameter]
    weight: float
    """What the method's scale was multiplied with."""
    place: tuple[str, str, str]
    """The path that the file knows, that of the module that holds the weight, and what the file puts between the first and a tensor's name."""

    def values(self) -> Any:
        """The tensors of the moment in the shapes that the equation reads."""
        p = Values()
        p.__dict__.update({spec.name: spec.view(getattr(self, spec.name)) for spec in self.specs})
        if self.shared is not None:
            p.__dict__.update(self.shared._buffers)
        return p

    def equation(self, W: Adapted) -> Adapted:
        """W' from W with this adapter's tensors."""
        return self.method.equation(W, self.values())

    def named(self, adapter: str, tensor: str) -> dict[str, str]:
        """The names of its tensors in the file → those in the model, both from the model's root, for an adapter of one weight of the module at `place`."""
        path, module, key = self.place
        return {f"{path}.{key}{s.key}": f"{module}.{ADAPTERS}.{adapter}.{tensor}.{s.name}" for s in self.specs if s.key}

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors by their name in the adapter file."""
        return {s.key: getattr(self, s.name) for s in self.specs if s.key}

    def by_name(self) -> dict[str, Tensor]:
        """The same tensors by their name in the equation."""
        return {s.name: getattr(self, s.name) for s in self.specs if s.key}

    def state(self) -> dict[str, Tensor]:
        """What training has changed besides the parameters, by name."""
        return {s.name: getattr(self, s.name) for s in self.specs if s.state}


class Adapter(Share, nn.Module):
    """One adapter of one weight as a module of the model; it does not require grad yet.

    Args:
        drawn: give the tensors of the file their first values, which are 0 otherwise, until a file is read.
    """

    def __init__(self, method: Method, form: Form, like: Tensor, dtype: torch.dtype, shared: Shared | None, *, drawn: bool = True) -> None:
        super().__init__()
        self._describe(method, form, shared, method.all_parameters(form))
        for spec in self.specs:
            number = dtype if spec.dtype is None else getattr(torch, spec.dtype)
            value = torch.zeros(spec.stored or spec.shape, dtype=number, device=like.device)
            if drawn or not spec.key:
                with torch.no_grad():
                    spec.init(value)
            self._keep(spec, value)

    @classmethod
    def of(cls, method: Method, form: Form, shared: Shared | None, specs: list[Parameter], tensors: Mapping[str, Tensor]) -> Self:
        """An adapter of tensors that are there already, by their names."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._describe(method, form, shared, specs)
        for spec in specs:
            new._keep(spec, tensors[spec.name])
        return new

    def _describe(self, method: Method, form: Form, shared: Shared | None, specs: list[Parameter]) -> None:
        self.method, self.form, self.weight = method, form, 1.0
        self._unweighted = method
        self.place = ("", "", "")
        self.shared = shared
        self.specs = specs

    def _keep(self, spec: Parameter, value: Tensor) -> None:
        if spec.trainable:
            self.register_parameter(spec.name, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(spec.name, value, persistent=spec.state)

    @property
    def first_scale(self) -> float | None:
        """The method's scale before it was weighted."""
        return self._unweighted.scale

    def weigh(self, weight: float) -> None:
        """Multiply the method's scale, as it was at first, with `weight`."""
        self.method, self.weight = self._unweighted.weighted(weight), weight

    def extra_repr(self) -> str:
        return repr(self.method)
