"""Adapters on and off the shelf: pack one, attach it again, and keep to the budget, the least recently used first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from .errors import StateError
from .laying import forget_modules, packed
from .records import check_names, holder_at, holders_of, record


def bring(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Attach these adapters again where they are packed; returns those that are to be packed for it, by `lay_down`.

    Raises:
        StateError: the budget does not hold as many, or others cannot be packed; nothing is changed.
        AdapterFileError: one waits on disk, where it was changed; nothing is changed.
    """
    shelf = record(model).shelf
    leaving = over_budget(model, names)
    unpack(model, names)
    for n in names:
        shelf.touch(n)
    return leaving


def unpack(model: nn.Module, names: Sequence[str]) -> None:
    """Attach these adapters again where they are packed, whatever the budget; `keep_to_budget` is to follow.

    Raises:
        AdapterFileError: one waits on disk, where it was changed; nothing is changed.
    """
    shelf = record(model).shelf
    coming = {n: shelf.read(n) for n in dict.fromkeys(names) if n in shelf}
    for n, found in coming.items():
        found.put_back(n, partial(holder_at, model))
        shelf.take(n)


def keep_to_budget(model: nn.Module) -> None:
    """Pack what is attached beyond the budget, and move what is packed beyond it.

    Raises:
        StateError: more are active than may be attached, or the others cannot be packed; nothing is changed.
        AdapterFileError: as for `lay_down`.
    """
    lay_down(model, over_budget(model, record(model).active))


def over_budget(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The least recently used adapters that must be packed so that those that are wanted can be attached within the budget.

    Raises:
        StateError: those that are wanted are more than the budget, or the others cannot be packed.
    """
    note = record(model)
    limit = note.shelf.budget.attached
    if limit is None:
        return []
    own = set(wanted)
    if len(own) > limit:
        raise StateError(f"{len(own)} adapters at once, and the budget allows {limit} to be attached (hold); give it more, or name fewer")
    others = [n for n in note.shelf.used if n in note.plans and n not in note.shelf and n not in own]
    over = max(len(others) + len(own) - limit, 0)
    leaving: list[str] = []
    reasons: list[str] = []
    for n in others:
        if len(leaving) == over:
            break
        why = _why_not(model, n)
        if why is None:
            leaving.append(n)
        else:
            reasons.append(f"{n!r} {why}")
    if len(leaving) < over:
        raise StateError(f"the budget allows {limit} attached adapters (hold), and others cannot be packed: {'; '.join(reasons)}")
    return leaving


def lay_down(model: nn.Module, names: Sequence[str]) -> None:
    """Pack adapters that are not active, and keep to the budget for packed ones.

    Raises:
        AdapterFileError: the directory of the budget cannot be written; what could not be moved there stays in memory.
    """
    for name in names:
        _pack(model, name)
    record(model).shelf.settle()


def pack(model: nn.Module, name: str) -> None:
    """Take an adapter off its modules and lay its tensors end to end; it can be used and attached again by its name.

    Raises:
        StateError: it is not there, active, merged, or being trained; nothing is changed.
        AdapterFileError: as for `lay_down`.
    """
    note = check_names(model, [name])
    if name in note.shelf:
        return
    why = "is active; make another one active first (set_adapter)" if name in note.active else _why_not(model, name)
    if why is not None:
        raise StateError(f"adapter {name!r} {why}")
    lay_down(model, [name])


def _why_not(model: nn.Module, name: str) -> str | None:
    """Why an adapter cannot be packed, as the end of a sentence."""
    if record(model).plans[name].biases:
        return "trains the base model's own biases in place, so it cannot be put aside"
    for holder in holders_of(model, [name]):
        if name in getattr(holder, "veneer_merged_names", ()):
            return "is merged into the weights; unmerge_adapter() first"
        if any(p.grad is not None for p in holder.veneer[name].parameters()):
            return "is being trained: its parameters have gradients; optimizer.zero_grad() first"
    return None


def _pack(model: nn.Module, name: str) -> None:
    note, find = record(model), partial(holder_at, model)
    done = packed(name, note.plans[name], note.shared.get(name), find, note.shelf.patterns)
    note.reaches.forget(name)
    forget_modules(name, done, find)
    note.plans[name] = done.pattern.plan
    if done.pattern.shared is not None:
        note.shared[name] = done.pattern.shared
    note.shelf.put(name, done, note.configs[name], note.labels.get(name))
