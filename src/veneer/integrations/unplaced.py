"""An adapter's equations from its files alone, without a model: the forms of the weights are read off the shapes of the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from torch import Tensor

from ..config import PREFIX, PeftConfig
from ..errors import StateError
from ..form import Form
from ..layers.adapted import Values
from ..methods.base import Method
from ..operators import Adapted


class Absent:
    """A W of which nothing but the form is known."""

    def __init__(self, form: Form) -> None:
        self.form = form

    def dense(self) -> Tensor:
        """It has no numbers.

        Raises:
            StateError: always.
        """
        raise StateError("this needs the base model's weights; give the model")


def equations_of_files(config: PeftConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Adapted | None, int]]:
    """Path of a layer, its equation, and its number of parameters.

    The equation is None where the tensors leave a doubt of the weight's form, where it reads W, and where layers share constants that no file holds.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, found = _split(config, key)
        if found:
            layers.setdefault(path, {})[found] = tensor
    shared = bool(config.shared([Form(8, 8)]))
    for path, own in layers.items():
        method = config.method(path.removeprefix(PREFIX))
        form = None if shared else _form(method, own)
        yield path, None if form is None else _equation(method, form, own), sum(t.numel() for t in own.values())


def _equation(method: Method, form: Form, own: Mapping[str, Tensor]) -> Adapted | None:
    p: Any = Values()
    for spec in method.parameters(form):
        setattr(p, spec.name, spec.view(own[spec.key].float()))
    try:
        return method.equation(Adapted(Absent(form)), p)
    except StateError:
        return None


def _split(config: PeftConfig, key: str) -> tuple[str, str]:
    """A key as the layer's path and the tensor's name there."""
    names = {s.key for form in (Form(8, 8), Form(64, 64), Form(8, 8, lookup=True)) for s in _specs(config.method(""), form)}
    for name in sorted(names, key=len, reverse=True):
        if key.endswith("." + name):
            return key[: -len(name) - 1], name
    return key, ""


def _specs(method: Method, form: Form) -> list[Any]:
    return [s for s in method.parameters(form) if s.key] if method.why_not(form) is None else []


def _form(method: Method, own: Mapping[str, Tensor]) -> Form | None:
    """The one form of a weight that has these tensors; None where there is none, or more than one that the equation would tell apart."""
    sizes = {n for t in own.values() for n in t.shape if n > 1}
    sizes |= {a * b for a, b in product(sizes, sizes)}
    found = []
    for out, in_ in product(sorted(sizes), sorted(sizes)):
        form = Form(out, in_)
        specs = method.parameters(form) if method.why_not(form) is None else []
        if all(s.key for s in specs) and {s.key: tuple(s.stored or s.shape) for s in specs} == {k: tuple(t.shape) for k, t in own.items()}:
            found.append(form)
    return found[0] if len(found) == 1 else None
