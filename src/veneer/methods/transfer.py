"""One adapter's numbers as another's: the stored tensors with which one method's equation says what another's says with its own.

A smaller rank is filled up with numbers that change nothing, another scale is put into a tensor that the change is proportional to. Which tensors these are is each method's to say
(`Parameter.still`, `grows`, `scaled`), and which of its fields may differ (`Method.loose`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from ..errors import StateError
from ..form import Form
from .base import Method, Parameter

if TYPE_CHECKING:
    from torch import Tensor


def values_for(own: Method, other: Method, form: Form, given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The stored tensors with which one method's equation says what another's says with the given ones.

    Raises:
        StateError: there are none.
    """
    import torch

    why = difference(own, other)
    specs, others = own.all_parameters(form), {s.name: s for s in other.all_parameters(form)}
    if why is None and others.keys() != {s.name for s in specs}:
        why = f"it has the tensors {', '.join(others)}, the attached one {', '.join(s.name for s in specs)}"
    if why is not None:
        raise StateError(f"{where}: {why}, so its numbers do not fit the attached equation; load it under a name of its own instead")
    s, t = own.scale, other.scale
    factor = 1.0 if s is None or t is None or s == t else t / s if s else None
    if factor is None:
        raise StateError(
            f"{where}: the attached adapter's scale is 0, which no number makes another; attach an adapter with another alpha first"
        )
    found = {}
    for spec in specs:
        if not spec.key or spec.name not in given:
            continue
        value = others[spec.name].view(given[spec.name])
        if spec.scaled and factor != 1:
            value = factor * value.to(torch.promote_types(value.dtype, torch.float32))
        found[spec.name] = spec.laid(_grown(spec, value, where))
    return found


def _grown(spec: Parameter, value: Tensor, where: str) -> Tensor:
    """The value in the corner of a tensor of the parameter's shape, the rest filled with what changes nothing."""
    if value.shape == spec.shape:
        return value
    larger = [d for d, (n, m) in enumerate(zip(value.shape, spec.shape, strict=True)) if n != m]
    if any(d not in spec.grows for d in larger) or spec.still is None:
        raise StateError(
            f"{where}: {spec.name} is {tuple(value.shape)}, the attached {tuple(spec.shape)}, and the method allows no other numbers there; swap adapters of equal shapes"
        )
    if any(value.shape[d] > spec.shape[d] for d in larger):
        raise StateError(
            f"{where}: {spec.name} is {tuple(value.shape)}, larger than the attached {tuple(spec.shape)}; call prepare_model_for_compiled_hotswap(model, target_rank=…) with the "
            "largest rank before compiling, or attach the adapter of the largest rank first"
        )
    whole = value.new_empty(spec.shape)
    spec.still(whole)
    whole[tuple(slice(n) for n in value.shape)] = value
    return whole


def difference(own: Method, other: Method) -> str | None:
    """In what two methods' equations differ, beyond what tensors can make up for."""
    if type(own) is not type(other):
        return f"it is {type(other).__name__}, the attached one {type(own).__name__}"
    assert is_dataclass(own)
    for f in fields(own):
        a, b = getattr(own, f.name), getattr(other, f.name)
        if isinstance(a, Method) and isinstance(b, Method):
            inner = difference(a, b)
            if inner is not None:
                return inner
        elif f.name not in own.loose and a != b:
            return f"it has {f.name}={b!r}, the attached one {a!r}"
    return None
