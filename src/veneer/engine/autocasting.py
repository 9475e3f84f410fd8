"""Autocast as the engine asks about it: a device that has none is one where it is off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_on(device: torch.device) -> bool:
    """Whether autocast chooses the number type on this device now."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def off(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off on this device."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()
