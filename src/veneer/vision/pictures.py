"""Opening one picture: whatever the file holds, the caller gets upright RGB or an error with the reason.

`Image.open(path).convert("RGB")` is the usual way, and it is wrong four times without a word: it ignores the camera's orientation, clips
16-bit grey to white, shows the colour hidden under transparent pixels, and can leave a truncated file half grey. A model learns from what
this module returns, so each of the four is decided here, once: upright, scaled, composited on white, refused. Formats that run another
program (EPS) are never opened. Colour profiles are not applied, as in every usual training pipeline.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from veneer.errors import DataError

# HEIF, JXL and JPEGXL count only where the user has registered a plugin for them.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "DIB", "QOI", "PCX", "SGI", "PSD", "HEIF",
    "JXL", "JPEGXL",
)  # fmt: skip
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEEP_GREY = 65535  # the largest value of a 16-bit picture


class UnreadableImage(DataError):  # noqa: N818 - reads as what it is about
    """A file that is no picture, or a damaged one; `source` says which and `reason` why."""

    def __init__(self, source: str, reason: str = "") -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"Cannot read the picture {self.source}: {self.reason}." if self.reason else self.source


def open_image(path: str | Path) -> Image.Image:
    """Open a picture as RGB, upright, or say why not.

    The EXIF orientation is applied; transparent pixels are composited on white; 16-bit grey is scaled to 8 bits; of an animation the first
    frame counts.

    Args:
        path: the picture's file, in any format of `FORMATS`; its content decides, not its name.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, too large to be safe, or no picture.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("LA", (4, 2), (0, 0)).save(f"{folder}/clear.png")
    ...     open_image(f"{folder}/clear.png").getpixel((0, 0))
    (255, 255, 255)
    """
    with _opened(Path(path)) as stream:
        return decode(stream, str(path))


def open_bytes(data: bytes, source: str) -> Image.Image:
    """Open a picture that is already in memory, as `open_image` does.

    Args:
        data: the encoded picture.
        source: where it came from, for the error.

    Raises:
        UnreadableImage: as `open_image`.

    >>> open_bytes(b"no picture", "row 3")
    Traceback (most recent call last):
    veneer.vision.pictures.UnreadableImage: Cannot read the picture row 3: not a picture.
    """
    return decode(io.BytesIO(data), source)


def fingerprint(path: Path) -> bytes:
    """Decode a picture's file completely and return a digest of its bytes, equal for equal files.

    Args:
        path: the picture's file.

    Raises:
        UnreadableImage: as `open_image`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (4, 2)).save(f"{folder}/a.png")
    ...     len(fingerprint(Path(f"{folder}/a.png")))
    16
    """
    with _opened(path) as stream:
        decode(stream, str(path))
        stream.seek(0)
        return digest(stream)


def digest(stream: BinaryIO) -> bytes:
    """Sixteen bytes that are equal for equal content.

    >>> digest(io.BytesIO(b"a")) == digest(io.BytesIO(b"a"))
    True
    """
    content = hashlib.blake2b(digest_size=16)
    while piece := stream.read(1 << 20):
        content.update(piece)
    return content.digest()


def decode(stream: BinaryIO, source: str) -> Image.Image:
    """Decode an open file to upright RGB.

    Args:
        stream: at the picture's first byte; it is left open.
        source: where it came from, for the error.

    Raises:
        UnreadableImage: as `open_image`.

    >>> decode(io.BytesIO(), "row 3")
    Traceback (most recent call last):
    veneer.vision.pictures.UnreadableImage: Cannot read the picture row 3: the file is empty.
    """
    try:
        with _whole_files_only(), Image.open(stream, formats=_formats()) as picture:
            picture.load()
            # Read after loading: some formats keep their EXIF behind the pixels, and TIFF turns itself.
            turn = UPRIGHT.get(_orientation(picture))
            rgb = _rgb(picture)
            return rgb.transpose(turn) if turn is not None else rgb
    except Exception as error:  # decoders of damaged files raise whatever their parser stumbles over
        raise UnreadableImage(source, _reason(error, stream)) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        # A named pipe would block for ever, so only regular files are opened.
        if path.exists() and not path.is_file():
            raise UnreadableImage(str(path), "a folder, not a picture" if path.is_dir() else "not a regular file")
        stream = path.open("rb")
    except UnreadableImage:
        raise
    except FileNotFoundError as error:
        raise UnreadableImage(str(path), "a link to nothing" if path.is_symlink() else "no such file") from error
    except PermissionError as error:
        raise UnreadableImage(str(path), "no permission to read it") from error
    except (OSError, ValueError) as error:
        raise UnreadableImage(str(path), str(getattr(error, "strerror", None) or error)) from error
    with stream:
        yield stream


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Truncated files are errors, even where another library has told Pillow to fill them with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    if not before:
        yield
        return
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; a damaged EXIF block means 1, for the pixels themselves are whole."""
    try:
        return int(picture.getexif().get(ORIENTATION_TAG, 1))
    except Exception:
        return 1


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        return _scaled_grey(picture).convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.has_transparency_data or picture.mode == "RGBa":
        clear = picture.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(white, clear).convert("RGB")
    return picture.convert("RGB")


def _scaled_grey(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits, or floats from 0 to 1, as 8 bits. Other ranges have no agreed meaning and are refused."""
    values = np.asarray(picture).astype(np.float64)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    top = 1 if picture.mode == "F" else DEEP_GREY
    if not (low >= 0 and high <= top):
        raise ValueError(
            f"its grey values run from {low:g} to {high:g}, and only 0 to {top} has an agreed meaning; save it as 8 or 16 bits"
        )
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _reason(error: Exception, stream: BinaryIO) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"too large to open safely: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, UnidentifiedImageError):
        stream.seek(0)
        start = stream.read(32)
        if not start:
            return "the file is empty"
        heic = start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
        return "a HEIC picture, which Pillow cannot read: convert it to JPEG" if heic else "not a picture"
    message = str(error) or type(error).__name__
    return f"the file is cut short: {message}" if "truncated" in message.lower() else f"damaged: {message}"
