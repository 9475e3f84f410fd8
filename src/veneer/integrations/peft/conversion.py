"""`convert_to_lora` and `save_as_lora` with the arguments that users of the `peft` package know."""

from __future__ import annotations

import os
from math import sqrt
from typing import Any

from torch import Tensor, nn

from ...config import PeftConfig
from ...converting import Conversion, convert
from ...errors import ConfigError


def convert_to_lora(
    model: nn.Module, rank: float, adapter_name: str = "default", progressbar: bool = False, compile_kwargs: Any = None
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The configuration and the tensors of the LoRA nearest to an attached adapter.

    Args:
        model: a model with adapters.
        rank: a whole number is the highest rank; a share of at most 1 that of the squared singular values which each layer keeps.
        adapter_name: the adapter.
        progressbar: show how far it is.
        compile_kwargs: accepted, and without meaning: there is no function to compile where factors are taken from the structure.

    Raises:
        ConfigError: a rank that is neither.
        StateError: a layer that LoRA's file has no place for.
    """
    done = _nearest(model, rank, adapter_name, progressbar)
    return done.config, done.tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:
    """Write the LoRA nearest to an attached adapter into a directory.

    Args:
        path: made if needed.
        model, rank, adapter_name, progressbar, compile_kwargs: as for `convert_to_lora`.
    """
    _nearest(model, rank, adapter_name, progressbar, path)


def _nearest(model: nn.Module, rank: float, name: str, progress: bool, path: str | os.PathLike[str] | None = None) -> Conversion:
    if isinstance(rank, int):
        return convert(model, name, rank, save_directory=path, progress=progress)
    if not 0 < rank <= 1:
        raise ConfigError(f"rank: a whole number of at least 1, or a share of at most 1, got {rank!r}")
    return convert(model, name, tolerance=sqrt(1 - rank), save_directory=path, progress=progress)
