"""Write adapters into the weights of one module, and put the very tensors back that were there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..engine import merged_bias, merged_matrix
from ..errors import StateError
from ..operators import pieces
from .storages import Storage, storage_of
from .switches import held_adapters

if TYPE_CHECKING:
    from .adapted import AdaptedModule


@dataclass(frozen=True)
class MergedWeight:
    """One weight that adapters were merged into.

    Args:
        path: of its module, and its name there if it is none of a layer that is called.
        storage: how it is packed.
        norm: ‖W'‖, of all its numbers.
        change: ‖W' − W‖.
        error: ‖Q(W') − W'‖, where Q(W') is what the weight's storage made of W'.
    """

    path: str
    storage: str
    norm: float
    change: float
    error: float

    @property
    def of_change(self) -> float:
        """The error, of the change: 1 means that as much was lost as was merged."""
        return self.error / self.change if self.change else float(self.error > 0)

    @property
    def of_weight(self) -> float:
        """The error, of the weight."""
        return self.error / self.norm if self.norm else float(self.error > 0)


@torch.no_grad()
def merged(module: AdaptedModule, tensor: str) -> tuple[Tensor, Tensor | None]:
    """W' and b' of the active adapters of one weight, W' in float32 or wider."""
    matrix = merged_matrix(module, tensor, disturb=False)
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32)), merged_bias(module, tensor)


def refuse_lost_shift(module: AdaptedModule, tensor: str, called: str) -> None:
    """Raise StateError where the active adapters add a bias to a module that has none."""
    if module.veneer_kinds[tensor].bias(module) is None and any(e.shift is not None for e, _ in module.equations(tensor)):
        raise StateError(f"{called} has no bias, and the adapter adds one, so there is nothing to merge it into; nothing was merged")


def refuse_not_finite(module: AdaptedModule, tensor: str, called: str) -> None:
    """Raise StateError where merging would write NaN or infinite numbers, which some become by rounding to the weight's own type only."""
    for name, value in _values(module, tensor):
        if not bool(value.to(_storage(module, name).dtype(module, name)).isfinite().all()):
            whose = called if name == tensor else f"the {name} of {called}"
            raise StateError(f"merging would write NaN or infinite numbers into {whose}; nothing was merged")


def needs_check(module: AdaptedModule, tensor: str) -> bool:
    """Whether merging would spoil a weight that NaN is written into: one that is packed says nothing of it afterwards."""
    return not _storage(module, tensor).plain


def _storage(module: AdaptedModule, name: str) -> Storage:
    found = storage_of(module, name)
    assert found is not None
    return found


def _values(module: AdaptedModule, tensor: str) -> Iterator[tuple[str, Tensor]]:
    """What merging writes: names of parameters, and their numbers in the module's own shapes."""
    kind = module.veneer_kinds[tensor]
    matrix, bias = merged(module, tensor)
    yield tensor, kind.to_weight(module, matrix)
    if kind.offset and bias is not None and bias is not kind.bias(module):
        yield kind.offset, bias


@torch.no_grad()
def write_merged(
    module: AdaptedModule,
    tensor: str,
    called: str = "",
    *,
    keep: bool = True,
    originals_device: torch.device | None = None,
    elsewhere: Callable[[str, nn.Parameter], bool] | None = None,
) -> MergedWeight:
    """Write the active adapters into one weight and its bias.

    Args:
        called: its path, for the report.
        keep: keep the originals, so that `put_back` can restore them.
        originals_device: where they are kept; None leaves them where they are.
        elsewhere: whether a parameter, by its name here, is in use elsewhere too, where it must stay as it is.
    """
    found = None
    for name, value in list(_values(module, tensor)):
        storage = _storage(module, name)
        if name == tensor:
            before = storage.read(module, name)
            norm, change, exact = _length(value), _length(value, before), value.dtype is before.dtype and storage.plain
            del before
        own = module._parameters[name]
        assert own is not None
        if keep or (elsewhere is not None and elsewhere(name, own)):
            new, own = storage.pack(module, name, value), storage.take(module, name)
            storage.put(module, name, new)
            if keep:
                module.veneer_merged[name] = own
                if originals_device is not None:
                    storage.move(own, originals_device)
        else:
            storage.write(module, name, value)
        if name == tensor:
            error = 0.0 if exact else _length(value, storage.read(module, name))
            found = MergedWeight(called, storage.name, norm, change, error)
    if keep:
        module.veneer_merged_names = module.veneer_active
    assert found is not None
    return found


def _length(a: Tensor, b: Tensor | None = None) -> float:
    """‖a − b‖ of all numbers, by rows, so that no third matrix is made."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows in pieces(a):
        total += (
            torch.linalg.vector_norm(
                a[rows] if b is None else a[rows] - b[rows], dtype=torch.float64 if a.dtype is torch.float64 else torch.float32
            )
            .double()
            .square()
        )
    return float(total.sqrt())


@torch.no_grad()
def put_back(module: AdaptedModule) -> None:
    """Put the original tensors back, on the device where the merged ones are."""
    for name, own in module.veneer_merged.items():
        storage, now = _storage(module, name), module._parameters[name]
        if now is not None and storage.device(own) != now.device:
            storage.move(own, now.device)
        storage.put(module, name, own)
    module.veneer_merged, module.veneer_merged_names = {}, ()


def merge_again(module: AdaptedModule, names: Sequence[str]) -> None:
    """Merge adapters that were merged before."""
    with only(module, names):
        for tensor in module.veneer_kinds if names else ():
            if next(module.adapters(tensor), None) is not None:
                write_merged(module, tensor)


@contextmanager
def only(module: AdaptedModule, names: Sequence[str]) -> Iterator[None]:
    """Let exactly these adapters be the active ones of one module inside the block."""
    before, module.veneer_active = module.veneer_active, tuple(n for n in names if n in module.veneer)
    try:
        yield
    finally:
        module.veneer_active = before


def merge(self: AdaptedModule, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
    """Write the active adapters, or the named ones, into this module's weights, beside those that are merged already.

    Args:
        safe_merge: refuse to write NaN or infinite numbers.

    Raises:
        StateError: the merged weights would not be finite, or a bias has no place; the module is as it was.
    """
    wanted = held_adapters(self) if adapter_names is None else list(adapter_names)
    before = self.veneer_merged_names
    names = list(dict.fromkeys([*before, *(n for n in wanted if n in self.veneer)]))
    if names == list(before):
        return
    put_back(self)
    try:
        with only(self, names):
            for tensor in self.veneer_kinds:
                refuse_lost_shift(self, tensor, f"this {type(self).__name__}")
                if safe_merge or needs_check(self, tensor):
                    refuse_not_finite(self, tensor, f"this {type(self).__name__}")
            for tensor in self.veneer_kinds:
                if next(self.adapters(tensor), None) is not None:
                    write_merged(self, tensor)
    except StateError:
        merge_again(self, before)
        raise


def unmerge(self: AdaptedModule) -> None:
    """Put this module's original weights back, bit for bit."""
    put_back(self)


@torch.no_grad()
def get_delta_weight(self: AdaptedModule, adapter: str) -> Tensor:
    """W' − W of one adapter, in the layer's own shape."""
    if self.veneer_merged:
        raise StateError("the weights are merged, so W is not at hand; call unmerge() first")
    tensor, kind = next(iter(self.veneer_kinds.items()))
    with only(self, [adapter]):
        if not self.veneer_active:
            raise StateError(f"no adapter is called {adapter!r} here; there are {', '.join(self.veneer)}")
        matrix, _ = merged(self, tensor)
    return kind.to_weight(self, matrix - kind.matrix(self).to(matrix.dtype))
