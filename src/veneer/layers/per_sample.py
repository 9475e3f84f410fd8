"""Arguments and outputs of a module's forward, by sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import Assignment, put_together
from ..errors import StateError
from .swap import own_class


class Arguments:
    """What a module's forward was called with, of which samples can be picked.

    Raises:
        StateError: the samples cannot be told apart in one of the tensors.
    """

    def __init__(
        self, module: nn.Module, batch: Assignment, args: Sequence[Any], kwargs: Mapping[str, Any], where: Callable[[], str]
    ) -> None:
        self.batch, self.args, self.kwargs = batch, args, kwargs
        names = list(inspect.signature(own_class(module).forward).parameters)[1:]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        self.dim = 1 if isinstance(module, nn.MultiheadAttention) and not module.batch_first else 0
        self._dims: dict[int, int] = {}
        self.each = 0
        for name, value in named.items():
            for t in every_tensor(value):
                self._note(name, t, isinstance(module, nn.MultiheadAttention), where)
        if not self.each:
            raise StateError(f"{where()}: called without a tensor that has the samples of the batch, so adapter_names cannot be followed")

    def _note(self, name: str, t: Tensor, attention: bool, where: Callable[[], str]) -> None:
        """Where the samples lie in one tensor."""
        if attention and name == "attn_mask" and t.dim() == 2:
            return  # the same for all samples
        dim = 0 if name in ("attn_mask", "key_padding_mask") else self.dim
        if not self.each:
            shape = t.shape if not dim or t.dim() < 3 else torch.Size((t.shape[1], 1, *t.shape[2:]))
            self.each = self.batch.rows_each(shape, 0 if attention and t.dim() < 3 else max(1, t.dim() - 1), where)
        rows = self.each * len(self.batch)
        if not t.dim() or t.shape[0] == 1 != rows:
            return
        heads = attention and name == "attn_mask"
        if t.dim() <= dim or (t.shape[dim] % rows if heads else t.shape[dim] != rows):
            raise StateError(
                f"{where()}: the samples of the batch cannot be told apart in {name}, of shape {tuple(t.shape)}; call the model for each adapter by itself"
            )
        self._dims[id(t)] = dim

    def of(self, samples: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of some samples; a tensor that is given twice stays one."""
        pick = self.batch.pick(samples)
        made: dict[int, Tensor] = {}

        def own(t: Tensor) -> Tensor:
            if id(t) not in self._dims:
                return t
            if id(t) not in made:
                made[id(t)] = pick.of(t, self._dims[id(t)])
            return made[id(t)]

        return [mapped(a, own) for a in self.args], {k: mapped(v, own) for k, v in self.kwargs.items()}


def sequence_first(model: nn.Module) -> bool:
    """Whether some module expects its samples in the second dimension."""
    known = (nn.MultiheadAttention, nn.RNNBase)
    return any(not m.batch_first for m in model.modules() if isinstance(m, known))


def every_tensor(value: Any) -> Iterator[Tensor]:
    """The tensors of a value, through lists, tuples, dictionaries and objects that are made of fields."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from every_tensor(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from every_tensor(v)
    elif hasattr(type(value), "__dataclass_fields__"):
        for v in vars(value).values():
            yield from every_tensor(v)


def mapped(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """A value with f applied to its tensors, through lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Mapping):
        return type(value)(**{k: mapped(v, f) for k, v in value.items()}) if all(isinstance(k, str) for k in value) else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, f) for v in value))
    return type(value)(mapped(v, f) for v in value) if isinstance(value, (list, tuple)) else value


def outputs_together(found: Sequence[tuple[list[int], Any]], batch: Assignment, given: Arguments, where: Callable[[], str]) -> Any:
    """One output of all samples from those of each adapter; tensors that differ in one dimension are filled up with -inf, which the batch notes.

    Raises:
        StateError: outputs of other shapes, or of different widths where a loss is to be computed.
    """
    first = found[0][1]
    if isinstance(first, (tuple, list)):
        columns = zip(*(out for _, out in found), strict=True)
        parts = [outputs_together([(s, v) for (s, _), v in zip(found, c, strict=True)], batch, given, where) for c in columns]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if not isinstance(first, Tensor):
        return first
    # An attention's weights have the samples first, wherever its input has them.
    dim = given.dim if all(out.dim() > given.dim and out.shape[given.dim] == given.each * len(s) for s, out in found) else 0
    if any(not out.dim() or out.shape[dim] != given.each * len(s) for s, out in found):
        raise StateError(f"{where()}: the samples of the batch cannot be told apart in its output of shape {tuple(first.shape)}")
    return _filled_up(found, dim, batch, given, where)


def _filled_up(
    found: Sequence[tuple[list[int], Tensor]], dim: int, batch: Assignment, given: Arguments, where: Callable[[], str]
) -> Tensor:
    shapes = [[*out.shape[:dim], *out.shape[dim + 1 :]] for _, out in found]
    if all(s == shapes[0] for s in shapes):
        return put_together(found, dim)
    differ = [d for d in range(len(shapes[0])) if len({tuple(s)[d] for s in shapes if len(s) == len(shapes[0])}) > 1]
    if len(differ) != 1 or any(len(s) != len(shapes[0]) for s in shapes):
        raise StateError(f"{where()}: the adapters' outputs of shapes {sorted({tuple(o.shape) for _, o in found})} do not go together")
    if batch.labelled:
        raise StateError(
            f"{where()}: the heads of this batch have different numbers of outputs, so the model cannot compute one loss; leave labels out, and compute "
            "each sample's loss from its own logits"
        )
    along = differ[0] if differ[0] < dim else differ[0] + 1
    widest = max(out.shape[along] for _, out in found)
    widths = {i: out.shape[along] for samples, out in found for i in samples}
    behind = [0, 0] * (found[0][1].dim() - 1 - along)
    y = put_together([(s, F.pad(out, [*behind, 0, widest - out.shape[along]], value=-torch.inf)) for s, out in found], dim)
    batch.padded.append((y, along, [widths[i] for i in range(len(batch))]))
    return y
