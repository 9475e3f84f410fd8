"""Random changes of training pictures, drawn from torch's generator, so that a seed and a resumed run repeat them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from PIL import Image


class Augment:
    """Turn a picture into a randomly changed one.

    Args:
        kind: "none" leaves it to the processor; "light" shifts by up to 10 %, turns by up to 10° and zooms by up to 10 %, never mirrors (digits, writing),
            and leaves resizing and cropping to the processor, so that the view is evaluation's; "standard" crops 35–100 % of the area at a ratio of 3/4
            to 4/3, mirrors every second picture and gives it the model's size.
        size: the model's (height, width).
    """

    def __init__(self, kind: Literal["none", "light", "standard"], size: tuple[int, int]) -> None:
        self.kind, self.size = kind, size

    @property
    def sizes(self) -> bool:
        """Whether changed pictures have the model's size, so that the processor must not resize or crop them."""
        return self.kind == "standard"

    def __call__(self, picture: Image.Image) -> Image.Image:
        if self.kind == "none":
            return picture
        return self._light(picture) if self.kind == "light" else self._standard(picture)

    def _light(self, picture: Image.Image) -> Image.Image:
        shift_x, shift_y, turn, zoom = ((torch.rand(4) * 2 - 1) * 0.1).tolist()
        # Moving every pixel of a photograph takes a second; twice the model's size loses nothing that the model sees.
        factor = min(picture.width // (2 * self.size[1]), picture.height // (2 * self.size[0]))
        picture = picture.reduce(factor) if factor > 1 else picture
        angle, scale = math.radians(100 * turn), 1 + zoom
        width, height = picture.size
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        cx, cy = width / 2, height / 2
        # The inverse map, output to input: turn and zoom about the centre, then shift.
        x0 = cx - cos * cx - sin * cy + shift_x * width
        y0 = cy + sin * cx - cos * cy + shift_y * height
        border = picture.getpixel((0, 0))
        moved = (cos, sin, x0, -sin, cos, y0)
        return picture.transform(picture.size, Image.Transform.AFFINE, moved, Image.Resampling.BILINEAR, fillcolor=border)

    def _standard(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        area, ratio, x, y, mirror = torch.rand(5).tolist()
        target = (0.35 + 0.65 * area) * width * height
        aspect = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = min(width, math.sqrt(target * aspect)), min(height, math.sqrt(target / aspect))
        left, top = x * (width - w), y * (height - h)
        cropped = picture.resize(self.size[::-1], Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else cropped
