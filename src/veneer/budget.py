"""How many adapters may be kept where; checked when it is said, not when it is needed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """How much may be kept where; None is without limit.

    Args:
        attached: adapters that are modules of the model.
        device_bytes: of packed adapters in the memory of the model's device.
        offload: where packed adapters go beyond that: "cpu", or a directory.
    """

    attached: int | None = None
    device_bytes: int | None = None
    offload: str | Path | None = None


def checked_budget(attached: int | None, device_bytes: int | None, offload: str | Path | None, device: torch.device) -> Budget:
    """A budget that can be kept.

    Raises:
        ConfigError: numbers or places that cannot be used.
    """
    for called, value, least in (("attached", attached, 1), ("device_bytes", device_bytes, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(f"{called}: a whole number of at least {least}, or None, got {value!r}")
    if (device_bytes is None) != (offload is None):
        raise ConfigError(
            "device_bytes and offload go together: how many bytes of packed adapters stay, and where the rest goes ('cpu' or a directory)"
        )
    if offload == "cpu":
        if device.type == "cpu":
            raise ConfigError("offload='cpu': the model is on the CPU already; give a directory")
        return Budget(attached, device_bytes, "cpu")
    return Budget(attached, device_bytes, None if offload is None else _directory(Path(offload)))


def _directory(path: Path) -> Path:
    """A directory that can be written, made if needed."""
    path = path.expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise ConfigError(f"offload: {path} cannot be written ({e.strerror or e}); give a directory that can, or 'cpu'") from e
    return path
