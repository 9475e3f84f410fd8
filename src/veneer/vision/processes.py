"""Several processes of one torchrun: one of them makes the run's folder and speaks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ..errors import VeneerError
from .runs import Run


def processes() -> int:
    """How many processes this torchrun has; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process is the first, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def on_main_process(open_run: Callable[[], Run]) -> Run:
    """Open the run once, and tell the other processes of a torchrun where it is."""
    if processes() == 1:
        return open_run()
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available())
    opened: list[Any] = [None]
    if is_main_process():
        try:
            opened = [open_run()]
        except VeneerError as e:
            opened = [e]
    torch.distributed.broadcast_object_list(opened)
    if isinstance(opened[0], VeneerError):
        raise opened[0]
    run: Run = opened[0]
    return run
