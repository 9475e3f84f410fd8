"""Numbers that follow from a packed weight, found once for each version of it."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ...operators import traced

# Beside the modules and not in them, so that copies and pickles have no share in it.
_KEPT: WeakKeyDictionary[nn.Module, dict[str, tuple[Tensor, int, Tensor]]] = WeakKeyDictionary()


def kept(layer: nn.Module, name: str, packed: Tensor, find: Callable[[], Tensor]) -> Tensor:
    """What `find` gave when the packed numbers were last others.

    Args:
        name: of what is found.
        packed: the packed numbers; held here, so that no other tensor can come to lie at their address.
    """
    if traced():
        return find()
    known, now = _KEPT.setdefault(layer, {}), -1 if packed.is_inference() else packed._version
    if name in known:
        at, version, value = known[name]
        if at.data_ptr() == packed.data_ptr() and version == now:
            return value
    value = find()
    known[name] = (packed, now, value)
    return value
