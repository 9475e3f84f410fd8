"""Autocast as this package asks about it: a device that has none is one where it is off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_AS_IT_IS = nullcontext()


def is_on(device: torch.device) -> bool:
    """Whether autocast chooses the number type on this device now."""
    known = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def off(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off on this device; entering torch's own takes as long as a small product, so only where it is on."""
    return torch.autocast(device.type, enabled=False) if is_on(device) else _AS_IT_IS
