"""One picture at a time: every file becomes upright RGB or an error with the reason; and which files count as pictures."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from veneer.errors import DataError
from veneer.vision.data import UnreadableImage, find_images, open_image
from veneer.vision.finding import natural_key, walk


def noise(width: int = 12, height: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reason(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        open_image(path)
    assert caught.value.source == str(path)
    assert str(path) in str(caught.value)
    return caught.value.reason


def stored(picture: Image.Image, path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """A scene seen by a camera held in each of the eight ways gives the same picture; the corner colours say which way is up."""
    corners = {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255), (1, 1): (255, 255, 255)}
    upright = Image.new("RGB", (48, 32))
    for (x, y), colour in corners.items():
        upright.paste(colour, (24 * x, 16 * y, 24 * x + 24, 16 * y + 16))
    # What the sensor recorded, by the standard's table: where row 0 and column 0 of the file lie in the scene.
    pixels = np.asarray(upright)
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    flip_rows = {1: 0, 2: 0, 3: 1, 4: 1, 5: 0, 6: 1, 7: 1, 8: 0}  # 0th row: top, top, bottom, bottom, left, right, right, left
    flip_columns = {1: 0, 2: 1, 3: 1, 4: 0, 5: 0, 6: 0, 7: 1, 8: 1}  # 0th column: left, right, right, left, top, top, bottom, bottom
    pixels = pixels[:: -1 if flip_rows[orientation] else 1, :: -1 if flip_columns[orientation] else 1]
    path = stored(Image.fromarray(np.ascontiguousarray(pixels)), tmp_path / f"a{suffix}", orientation)
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", (48, 32))
    for (x, y), colour in corners.items():
        assert np.abs(np.array(opened.getpixel((12 + 24 * x, 8 + 16 * y))) - colour).max() < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_lose_the_picture(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_image(tmp_path / "a.jpg").size == (12, 8)


def test_deep_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + ramp.astype(">u2").tobytes())
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "f.tiff")
    for name in ("a.png", "a.tiff", "a.pgm", "f.tiff"):
        assert np.asarray(open_image(tmp_path / name))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)], name


def test_grey_without_an_agreed_range_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-3.5, 900.0]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert "from -3.5 to 900" in reason(tmp_path / "a.tiff")
    Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)).save(tmp_path / "b.tiff")
    assert "nan" in reason(tmp_path / "b.tiff")


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    hidden.putpixel((1, 0), (0, 0, 0, 128))
    hidden.save(tmp_path / "rgba.png")
    assert np.asarray(open_image(tmp_path / "rgba.png"))[0].tolist() == [[255] * 3, [127] * 3]
    Image.new("LA", (1, 1), (9, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "clear.png", transparency=1)
    palette.save(tmp_path / "clear.gif", transparency=1)
    for name in ("la.png", "clear.png", "clear.gif"):
        assert open_image(tmp_path / name).getpixel((0, 0)) == (255, 255, 255), name


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png")
    assert open_image(tmp_path / "p.png").getpixel((0, 0)) == (10, 20, 30)
    Image.new("1", (1, 1), 1).save(tmp_path / "bit.png")
    assert open_image(tmp_path / "bit.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    red, green, blue = open_image(tmp_path / "cmyk.jpg").getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50, lossless=True)
        assert open_image(tmp_path / name).getpixel((1, 1)) == (255, 0, 0), name


def test_truncated_files_are_refused_even_where_pillow_was_told_to_accept_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jpg", "a.png"):
        noise(64, 64).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    for tolerant in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
        assert reason(tmp_path / "a.jpg").startswith("the file is cut short")
        assert reason(tmp_path / "a.png").startswith("the file is cut short")
        assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


def test_what_is_no_picture_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture at all")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "phone.heic").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(64))
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    (tmp_path / "drawing.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "text.jpg") == "not a picture"
    assert reason(tmp_path / "empty.jpg") == "the file is empty"
    assert "convert it to JPEG" in reason(tmp_path / "phone.heic")
    assert reason(tmp_path / "gone.jpg") == "no such file"
    assert reason(tmp_path / "dangling.jpg") == "a link to nothing"
    assert "symbolic links" in reason(tmp_path / "self.jpg")
    assert reason(tmp_path / "drawing.jpg") == "not a picture"  # EPS would be run by Ghostscript
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    assert reason(tmp_path) == "a folder, not a picture"
    assert reason(tmp_path / "a\0b")


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert reason(tmp_path / "bomb.png").startswith("too large to open safely: more than 178,956,970 pixels")


@given(
    cut=st.integers(0, 700),
    flip=st.integers(0, 700),
    value=st.integers(0, 255),
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]),
)
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(cut: int, flip: int, value: int, kind: str) -> None:
    from veneer.vision.pictures import open_bytes

    buffer = io.BytesIO()
    noise().save(buffer, kind)
    data = bytearray(buffer.getvalue())
    data[flip % len(data)] = value
    try:
        assert open_bytes(bytes(data[: max(cut, 1)]), "row 1").mode == "RGB"
    except UnreadableImage as error:
        assert error.source == "row 1" and error.reason


def test_the_error_survives_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "no such file")))
    assert (error.source, error.reason, str(error)) == ("a.jpg", "no such file", "Cannot read the picture a.jpg: no such file.")
    assert str(UnreadableImage("one text, as data loaders rebuild errors")) == "one text, as data loaders rebuild errors"


def test_upright_agrees_with_pillow(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        path = stored(noise(), tmp_path / f"{orientation}.png", orientation)
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(ImageOps.exif_transpose(picture)), np.asarray(open_image(path)))


@given(st.lists(st.text(max_size=12)))
def test_natural_order_is_total_and_ignores_the_given_order(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


@given(st.lists(st.integers(0, 10**30)))
def test_numbers_are_ordered_by_value(values: list[int]) -> None:
    assert sorted((f"class {v}" for v in values), key=natural_key) == [f"class {v}" for v in sorted(values)]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for name in ("10.png", "2.PNG", "sub/1.jpg", "sub/.hidden.png", "notes.txt", ".git/x.png", "odd.bin", "[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise().save(tmp_path / name, "PNG")
    return tmp_path


def names(paths: list[Path], album: Path) -> list[str]:
    return [path.relative_to(album).as_posix() for path in paths]


def test_find_images_in_folders_files_and_globs(album: Path) -> None:
    everything = ["2.PNG", "10.png", "[1].png", "sub/1.jpg"]
    assert names(find_images([str(album)]), album) == everything
    assert names(find_images([f"{album}/**/*.jpg"]), album) == ["sub/1.jpg"]
    assert names(find_images([f"{album}/*"]), album) == ["2.PNG", "10.png", "[1].png", "sub/1.jpg"]
    assert names(find_images([f"{album}/[1].png", f"{album}/odd.bin"]), album) == ["[1].png", "odd.bin"]


def test_find_images_keeps_the_order_given_and_names_nothing_twice(album: Path) -> None:
    (album / "link.png").symlink_to(album / "10.png")
    found = find_images([f"{album}/sub", f"{album}/10.png", str(album), f"{album}/sub/../10.png", f"{album}/link.png"])
    assert names(found, album) == ["sub/1.jpg", "10.png", "2.PNG", "[1].png"]
    assert names(find_images(f"{album}/10.png"), album) == ["10.png"]  # type: ignore[arg-type]


def test_find_images_says_what_is_missing(album: Path) -> None:
    (album / "empty").mkdir()
    with pytest.raises(DataError, match=r'no file or folder .*/sup/1\.jpg \(.*/sup does not exist\)\. Did you mean "sub"\?'):
        find_images([str(album / "sup" / "1.jpg")])
    with pytest.raises(DataError, match=r'Did you mean "10\.png"'):
        find_images([str(album / "10.pgn")])
    with pytest.raises(DataError, match=r"Nothing matches .*\*\.webp\. Pictures end in"):
        find_images([str(album), f"{album}/*.webp"])
    with pytest.raises(DataError, match="matches 1 files or folders, but no pictures"):
        find_images([f"{album}/*.txt"])
    with pytest.raises(DataError, match=r"folder .*empty holds no pictures"):
        find_images([str(album / "empty")])
    with pytest.raises(DataError, match="name at least one"):
        find_images([])


def test_links_in_a_circle_end(album: Path) -> None:
    (album / "sub" / "up").symlink_to(album)
    (album / "twin").symlink_to(album / "sub")
    (album / "self").symlink_to(album / "self")
    assert names(find_images([str(album)]), album) == ["2.PNG", "10.png", "[1].png", "sub/1.jpg"]
    assert len(list(walk(album))) == 7
