"""Write adapters into the weights of one module, and put the very tensors back that were there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..engine import merged_bias, merged_matrix
from ..errors import StateError
from .switches import held_adapters

if TYPE_CHECKING:
    from .adapted import AdaptedModule


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
    """Raise StateError where merging would write NaN or infinite numbers."""
    if not all(bool(t.isfinite().all()) for t in merged(module, tensor) if t is not None):
        raise StateError(f"merging would write NaN or infinite numbers into {called}; nothing was merged")


@torch.no_grad()
def write_merged(
    module: AdaptedModule, tensor: str, *, keep: bool = True, elsewhere: Callable[[str, nn.Parameter], bool] | None = None
) -> None:
    """Write the active adapters into one weight and its bias.

    Args:
        keep: keep the originals, so that `put_back` can restore them.
        elsewhere: whether a parameter, by its name here, is in use elsewhere too, where it must stay as it is.
    """
    kind = module.veneer_kinds[tensor]
    matrix, bias = merged(module, tensor)
    changes_bias = bias is not None and bias is not kind.bias(module)
    originals = {}
    for name in [tensor, *([kind.offset] if kind.offset and changes_bias else [])]:
        own = module._parameters[name]
        assert own is not None
        if keep or (elsewhere is not None and elsewhere(name, own)):
            originals[name] = own
            module._parameters[name] = nn.Parameter(own.detach().clone(), requires_grad=False)
    kind.write(module, matrix)
    if changes_bias:
        kind.bias(module).copy_(bias)  # type: ignore[union-attr,arg-type]  # both are there
    if keep:
        module.veneer_merged |= originals
        module.veneer_merged_names = module.veneer_active


def put_back(module: AdaptedModule) -> None:
    """Put the original tensors back."""
    module._parameters.update(module.veneer_merged)
    module.veneer_merged, module.veneer_merged_names = {}, ()


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
                if safe_merge:
                    refuse_not_finite(self, tensor, f"this {type(self).__name__}")
            for tensor in self.veneer_kinds:
                if next(self.adapters(tensor), None) is not None:
                    write_merged(self, tensor)
    except StateError:
        with only(self, before):
            for tensor in self.veneer_kinds if before else ():
                write_merged(self, tensor)
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
