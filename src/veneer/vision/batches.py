"""Pictures as tensors: the data set that Trainer reads, and logits in fixed batches.

A picture is preprocessed as soon as it is open, and few are open at once: sixty-four photographs of a telephone held together would be nine gigabytes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .augment import Augment
from .data import Split

T = TypeVar("T")
R = TypeVar("R")


class PictureSet(torch.utils.data.Dataset[dict[str, Any]]):
    """A split as Trainer wants it: {"pixel_values": (3, height, width), "labels": int}."""

    def __init__(self, split: Split, processor: Any, change: Augment | None = None) -> None:
        self.split, self.processor, self.change = split, processor, change

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> dict[str, Any]:
        picture = self.split.image(i)
        if self.change is None:
            return {"pixel_values": pixels(self.processor, picture), "labels": self.split.labels[i]}
        changed = self.change(picture)
        return {"pixel_values": pixels(self.processor, changed, sized=self.change.sizes), "labels": self.split.labels[i]}


def pixels(processor: Any, picture: Image.Image, *, sized: bool = False) -> Tensor:
    """A preprocessed picture: (3, height, width); one that is `sized` has the model's size already and is not cropped a second time."""
    how = {"do_resize": False, "do_center_crop": False} if sized else {}
    return processor([picture], return_tensors="pt", **how)["pixel_values"][0]


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of each item, in order, computed in threads a little ahead of its use.

    >>> list(ahead(lambda x: x * x, range(5)))
    [0, 1, 4, 9, 16]
    """
    threads = min(8, os.cpu_count() or 1)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@torch.inference_mode()
def logits(model: Any, prepared: Iterable[Tensor], batch_size: int = 64) -> Tensor:
    """The model's answers for preprocessed pictures, in batches of `batch_size`: (n, labels), float32 on the CPU."""
    device = next(model.parameters()).device
    parts, batch = [], []
    for picture in prepared:
        batch.append(picture)
        if len(batch) == batch_size:
            parts.append(model(pixel_values=torch.stack(batch).to(device)).logits.float().cpu())
            batch = []
    if batch:
        parts.append(model(pixel_values=torch.stack(batch).to(device)).logits.float().cpu())
    return torch.cat(parts) if parts else torch.empty(0)


def split_logits(model: Any, processor: Any, split: Split, batch_size: int = 64) -> Tensor:
    """The model's answers for the pictures of a split: (n, labels)."""
    return logits(model, ahead(lambda i: pixels(processor, split.image(i)), range(len(split))), batch_size)
