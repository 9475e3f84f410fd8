"""Constant tensors that equations need again and again, made once for each device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .base import traced

T = TypeVar("T", bound=tuple[Any, ...])


def table(make: Callable[..., T]) -> Callable[..., T]:
    """Remember what a function of plain numbers, types and devices makes: a tuple, a tensor first, which nobody may write into."""
    made: dict[Hashable, T] = {}

    @wraps(make)
    def found(*key: Hashable) -> T:
        if traced():  # a compiler would watch the dictionary, and compile again when it has changed
            return make(*key)
        if key in made:
            return made[key]
        with torch.inference_mode(False), torch.no_grad():
            new = make(*key)
        if type(new[0]) is Tensor:  # a tracer's stand-ins must not outlive it
            made[key] = new
        return new

    return found
