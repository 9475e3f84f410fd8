"""The assignment of the forward that is running, and of those whose backward may run layers again.

A checkpoint computes its layers again in backward, when no forward of the model is running. Each forward leaves a mark on its outputs, which notes the backward that
reaches them first; so a layer that runs inside a backward knows the forward that it repeats, and where two forwards of different assignments share a backward it says so
instead of taking either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor

from ..errors import StateError
from .assignment import Assignment


class Forward:
    """One forward that backward may repeat; it lives as long as the graph of its outputs."""

    def __init__(self, batch: Assignment | None) -> None:
        self.batch, self.task = batch, -1

    def __call__(self, gradient: Tensor) -> None:
        """The hook on its outputs."""
        self.task = _backward()


class Batches:
    """What one model knows of its batches of several adapters; a copy of the model starts without."""

    def __init__(self) -> None:
        self.now: Assignment | None = None
        self.used = False
        """Whether there ever was one."""
        self.second: bool | None = None
        """Whether the model has modules that expect the samples in the second dimension; None until it was looked at."""
        self.forwards: WeakSet[Forward] = WeakSet()

    def __reduce__(self) -> tuple[Callable[[], Batches], tuple[()]]:
        return Batches, ()

    @contextmanager
    def running(self, batch: Assignment) -> Iterator[None]:
        """Let the layers inside the block see this assignment."""
        before, self.now, self.used = self.now, batch, True
        try:
            yield
        finally:
            self.now = before

    def current(self) -> Assignment | None:
        """The assignment that a layer is to follow now; None for the adapters that are active.

        Raises:
            StateError: a checkpoint repeats one of several forwards, which differ.
        """
        if self.now is not None or not self.used or torch.compiler.is_compiling() or _backward() < 0:
            return self.now
        living = list(self.forwards)
        here = [f for f in living if f.task == _backward()]
        if not here and all(f.batch is None for f in living):
            return None
        if not here or len({None if f.batch is None else f.batch.names for f in here}) > 1:
            raise StateError(
                "a gradient checkpoint computes its layers again, and it cannot be told for which of several forwards with different adapter_names; "
                "call backward after each forward, on what that forward returned"
            )
        return here[0].batch

    def mark(self, batch: Assignment | None, outputs: Iterable[Tensor]) -> None:
        """Note a forward on its outputs."""
        forward = Forward(batch)
        for t in outputs:
            if t.requires_grad and t.grad_fn is not None:
                t.register_hook(forward)
                self.forwards.add(forward)


def _backward() -> int:
    """The number of the backward that is running in this thread; -1 for none."""
    return torch._C._current_graph_task_id()
