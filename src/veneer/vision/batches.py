"""Pictures as tensors: the data set that Trainer reads, and logits in fixed batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .data import Split


class PictureSet(torch.utils.data.Dataset[dict[str, Any]]):
    """A split as Trainer wants it: {"pixel_values": (3, height, width), "labels": int}."""

    def __init__(self, split: Split, processor: Any, change: Callable[[Image.Image], Image.Image] | None = None) -> None:
        self.split, self.processor, self.change = split, processor, change

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> dict[str, Any]:
        picture = self.split.image(i)
        if self.change is not None:
            picture = self.change(picture)
        return {"pixel_values": pixels(self.processor, [picture])[0], "labels": self.split.labels[i]}


def pixels(processor: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """Preprocessed pictures: (n, 3, height, width)."""
    return processor(list(pictures), return_tensors="pt")["pixel_values"]


@torch.inference_mode()
def logits(model: Any, processor: Any, pictures: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
    """The model's answers for pictures, in batches of `batch_size`: (n, labels), float32 on the CPU."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(pictures), batch_size):
        batch = pixels(processor, pictures[start : start + batch_size])
        parts.append(model(pixel_values=batch.to(device)).logits.float().cpu())
    return torch.cat(parts) if parts else torch.empty(0)
