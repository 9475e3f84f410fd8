"""Mixed batches: a forward of the model in which each sample goes through its own adapter, or through none.

Everything that can be wrong is found before anything runs. What is active, and what requires grad, is left alone: the samples' adapters lie in the model's record while the forward
runs, and its layers ask for them there.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from .engine import BASE, Assignment
from .errors import ConfigError, StateError
from .inject import RECORD, Record, record
from .layers import every_tensor, sequence_first
from .operators import traced


class PerSample(tuple[Tensor, ...]):
    """One tensor for each sample, where their heads have different numbers of outputs."""

    id2label: tuple[Mapping[int, str] | None, ...]
    """The names of each sample's outputs; None where they are not known."""

    def __new__(cls, each: Sequence[Tensor], id2label: Sequence[Mapping[int, str] | None]) -> PerSample:
        new = super().__new__(cls, each)
        new.id2label = tuple(id2label)
        return new

    def __reduce__(self) -> Any:
        return PerSample, (tuple(self), self.id2label)


def forward(model: nn.Module, run: Callable[..., Any], names: Sequence[str] | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The output of `run`, with one adapter's name for each sample, or with the active adapters."""
    if names is None:
        out = run(*args, **kwargs)
        note = model.__dict__.get(RECORD)
        # From the first forward on: a later one with adapter_names may share its backward.
        if note is not None and torch.is_grad_enabled() and not traced():
            note.batches.mark(None, every_tensor(out))
        return out
    if torch.compiler.is_compiling():
        raise StateError("adapter_names cannot be followed by torch.compile; call the model that was not compiled")
    return _uncompiled(_forward)(model, run, names, args, kwargs)


def _uncompiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, inside which no compiler looks for parts to compile; the compiler is not imported for it."""
    return torch.compiler.disable(f) if "torch._dynamo" in sys.modules else f


def _forward(model: nn.Module, run: Callable[..., Any], names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    note = record(model)
    batch = assignment(model, names, args, kwargs)
    with note.batches.running(batch):
        out = run(*args, **kwargs)
    if batch.padded:
        out = by_sample(out, batch, note, model)
    note.batches.mark(batch, every_tensor(out))
    return out


def generating(model: nn.Module, generate: Callable[..., Any]) -> Callable[..., Any]:
    """The model's `generate`, which takes `adapter_names` too."""

    @wraps(generate)
    def mixed(*args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return generate(*args, **kwargs)
        note = record(model)
        with note.batches.running(assignment(model, adapter_names, args, kwargs)):
            return _uncompiled(generate)(*args, **kwargs)

    return mixed


def assignment(model: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Assignment:
    """The samples' adapters, checked.

    Raises:
        ConfigError: not one name for each sample.
        StateError: a name that is not attached, or a model that cannot run a batch of several adapters.
    """
    if isinstance(names, str):
        raise ConfigError(f"adapter_names: one name for each sample, in a list, got {names!r}")
    note, names = record(model), list(names)
    note.check([n for n in dict.fromkeys(names) if n != BASE])
    note.shelf.check_fits(names)
    inputs = [*every_tensor([*args, dict(kwargs)])]
    first = next((t for t in inputs if t.dim()), None)
    if first is None:
        raise ConfigError("adapter_names: the model was called without a tensor, so there is no batch to which the names could belong")
    if len(first) != len(names) or not names:
        raise ConfigError(
            f"adapter_names: one name for each sample; got {len(names)} names for {len(first)} samples (an input of shape {tuple(first.shape)})"
        )
    owner = next((n for n, plan in note.plans.items() if plan.biases), None)
    if owner is not None and set(names) != {owner}:
        raise StateError(
            f"adapter {owner!r} trains the base's biases in place, and there is only one set of them, so its samples cannot be mixed with others; "
            "train it with bias='none', or call the model for each adapter by itself"
        )
    if note.batches.second is None:
        note.batches.second = sequence_first(model)
    return Assignment(names, inputs, labelled=_labelled(model, args, kwargs), second=note.batches.second)


def _labelled(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    names = list(inspect.signature(model.forward).parameters)
    return (dict(zip(names, args, strict=False)) | dict(kwargs)).get("labels") is not None


def by_sample(out: Any, batch: Assignment, note: Record, model: nn.Module) -> Any:
    """The output with what heads of different widths gave as one tensor for each sample.

    Raises:
        StateError: the model went on computing with it.
    """
    note.naming.note(model)
    base = note.naming.of_base(model)
    own = None if base is None else base.names
    for y, along, widths in batch.padded:
        found = next((t for t in every_tensor(out) if t is y), None)
        if found is None:
            found = next((t for t in every_tensor(out) if _is_of(t, y, along, widths)), None)
        if found is None:
            raise StateError(
                "the heads of this batch have different numbers of outputs, and the model computes more from them than it returns; call the model for "
                "the adapters of each number by itself"
            )
        rows = found if len(found) == len(widths) else found.unflatten(0, (len(widths), -1))
        # From the end, because a sample's own rows lose a dimension, or keep one where it has several.
        axis = along - y.dim()
        each = [row.narrow(axis, 0, width) for row, width in zip(rows, widths, strict=True)]
        names = [_names(note.labels.get(n, own), width) for n, width in zip(batch.names, widths, strict=True)]
        out = _replaced(out, found, PerSample(each, names))
    return out


def _names(id2label: Mapping[int, str] | None, width: int) -> Mapping[int, str] | None:
    return id2label if id2label is not None and len(id2label) == width else None


def _is_of(t: Tensor, y: Tensor, along: int, widths: list[int]) -> bool:
    """Whether t is some rows of y: whatever was filled up still stands there, and nowhere else."""
    if along != y.dim() - 1 or t.dim() < 2 or t.shape[-1] != y.shape[-1] or len(t) != len(widths):
        return False
    beyond = torch.arange(t.shape[-1], device=t.device) >= torch.tensor(widths, device=t.device).unsqueeze(-1)
    beyond = beyond.view(len(widths), *(1,) * (t.dim() - 2), -1)
    return bool((torch.isneginf(t) == beyond).all())


def _replaced(value: Any, old: Tensor, new: PerSample) -> Any:
    """The value with another object in place of one tensor; dictionaries and objects made of fields are changed where they are."""
    if value is old:
        return new
    if isinstance(value, (list, tuple)) and not isinstance(value, PerSample):
        parts = [_replaced(v, old, new) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        for key, v in list(value.items()):
            if v is not (changed := _replaced(v, old, new)):
                value[key] = changed  # type: ignore[index]  # a fresh output
    elif hasattr(type(value), "__dataclass_fields__"):
        for key, v in list(vars(value).items()):
            if v is not (changed := _replaced(v, old, new)):
                setattr(value, key, changed)
    return value
