"""Which adapter each sample of a batch goes through, and which rows of a tensor belong to which sample.

The first dimension of a tensor inside a model is the batch, or a multiple of it in which the rows of a sample lie together (windows of a picture, beams of a sentence, tokens in
one row). What is neither, or could be something else by its shape, is an error that names the module: a guess would give samples each other's adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import prod
from operator import mul

import torch
from torch import Tensor

from ..errors import StateError

BASE = "__base__"
"""Stands for no adapter."""


class Assignment:
    """One adapter's name for each sample.

    Args:
        names: in the order of the samples; `BASE` for none.
        inputs: the tensors that the model was called with.
        labelled: whether the model computes a loss from labels.
        second: whether the model has modules that expect the samples in the second dimension.
    """

    def __init__(self, names: Sequence[str], inputs: Sequence[Tensor] = (), *, labelled: bool = False, second: bool = False) -> None:
        self.names, self.labelled, self.second = tuple(names), labelled, second
        self.single = self.names[0] if len(set(self.names)) == 1 else None
        """The one name, where all are the same."""
        self.padded: list[tuple[Tensor, int, list[int]]] = []
        """Outputs of heads of different widths as one tensor, the dimension along which they differ, and each sample's width."""
        self._totals = {n for t in inputs if t.dim() and len(t) == len(names) for n in accumulate(t.shape, mul)}
        self._picks: dict[tuple[tuple[int, ...], int], Pick] = {}

    def __len__(self) -> int:
        return len(self.names)

    def groups(self, holds: Callable[[str], object]) -> dict[str, list[int]]:
        """The numbers of the samples by adapter, where `holds` says which adapters a module has; those of the others under `BASE`."""
        found: dict[str, list[int]] = {}
        own: dict[str, str] = {}
        for i, name in enumerate(self.names):
            if name not in own:
                own[name] = name if name != BASE and holds(name) else BASE
            found.setdefault(own[name], []).append(i)
        return found

    def rows_each(self, shape: torch.Size, leading: int, where: Callable[[], str]) -> int:
        """How many rows of the first dimension belong to each sample.

        Args:
            leading: how many of the dimensions are not features.
            where: says of which module this is the input.

        Raises:
            StateError: the samples cannot be told apart.
        """
        B = len(self)
        total = prod(shape[:leading])
        if not leading or shape[0] % B:
            raise StateError(
                f"{where()}: an input of shape {tuple(shape)} does not have the {B} samples of this batch along its first dimension, so "
                "adapter_names cannot say which adapter its rows go through; call the model for each adapter by itself"
            )
        if leading >= 2 and shape[1] == B and (shape[0] != B or (self.second and B > 1)):
            raise StateError(
                f"{where()}: the {B} samples of this batch could lie along the first or the second dimension of an input of shape {tuple(shape)}; "
                "use a module with batch_first=True, or call the model for each adapter by itself"
            )
        if leading == 1 and len(shape) <= 2 and shape[0] != B and total not in self._totals:
            raise StateError(
                f"{where()}: the rows of an input of shape {tuple(shape)} are not all tokens of the {B} samples in their order, but picked ones, so "
                "adapter_names cannot say which adapter they go through; call the model for each adapter by itself"
            )
        if leading >= 2:
            self._totals.add(total)
        return shape[0] // B

    def pick(self, samples: Sequence[int], of: int | None = None) -> Pick:
        """The rows of some samples, made once for all layers."""
        key = tuple(samples), len(self) if of is None else of
        if key not in self._picks:
            self._picks[key] = Pick(*key)
        return self._picks[key]

    def part(self, name: str, samples: Sequence[int]) -> Assignment:
        """The assignment of some samples that go through one adapter."""
        return Assignment([name] * len(samples), labelled=self.labelled, second=self.second)


class Pick:
    """Some of n samples, of tensors whose first dimension is n, or a multiple of it."""

    def __init__(self, samples: tuple[int, ...], n: int) -> None:
        self.samples, self.n = samples, n
        first = samples[0]
        self.slice = slice(first, first + len(samples)) if samples == tuple(range(first, first + len(samples))) else None
        self.whole = self.slice is not None and len(samples) == n
        self._index: dict[torch.device, Tensor] = {}

    def index(self, device: torch.device) -> Tensor:
        """Their numbers, as a tensor."""
        if device not in self._index:
            self._index[device] = torch.tensor(self.samples, device=device)
        return self._index[device]

    def of(self, t: Tensor, dim: int = 0) -> Tensor:
        """Their rows; a view where they lie together."""
        if self.whole:
            return t
        each = t.shape[dim] // self.n
        t = t if each == 1 else t.unflatten(dim, (self.n, each))
        t = t.index_select(dim, self.index(t.device)) if self.slice is None else t.narrow(dim, self.slice.start, len(self.samples))
        return t if each == 1 else t.flatten(dim, dim + 1)

    def add(self, y: Tensor, change: Tensor) -> Tensor:
        """y with the change added to their rows; y, of n rows, may be overwritten."""
        if self.slice is None:
            return y.index_add_(0, self.index(y.device), change)
        y[self.slice] += change
        return y

    def replace(self, y: Tensor, rows: Tensor) -> Tensor:
        """y, of n rows, with theirs replaced; y is left as it is."""
        return rows.to(y.dtype) if self.whole else y.index_copy(0, self.index(y.device), rows.to(y.dtype))


def put_together(outputs: Sequence[tuple[Sequence[int], Tensor]], dim: int = 0) -> Tensor:
    """One tensor of all samples from those of disjoint sets of samples."""
    order = [i for samples, _ in outputs for i in samples]
    y = torch.cat([t for _, t in outputs], dim)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return Pick(tuple(inverse), len(order)).of(y, dim)


def pairs(groups: dict[str, list[int]], run: Callable[[str, list[int]], Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Each group's samples, and what `run` makes of them."""
    return ((samples, run(name, samples)) for name, samples in groups.items())
