"""Every fault of an image file, and the limit on its size."""

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fpn_engine.errors import ImageError
from fpn_engine.image_file import MAX_PIXELS
from fpn_engine.images import read_image, to_array
from tests.engine.image_files import PIXELS, photograph, refuse, save, write_png

# Damaged files


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "gif", "ppm", "jp2"])
def test_truncated_anywhere(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", photograph())
    whole = path.read_bytes()
    for part in (0.02, 0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(len(whole) * part)])
        refuse(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jpg", b"", "empty"),
        ("a.jpg", b"these are words, not pixels\n", "known format (JPEG, PNG"),
        ("a.jpg", b"\xff\xd8", "known format"),
        ("a.jpg", b"\xff\xd8\xff", "JPEG"),
        ("a.jpg", b"\xff\xd8\xff\xd9", "JPEG"),
        ("a.gif", b"GIF89a" + bytes(7) + b";", "GIF"),
        ("a.ppm", b"P6 0 0 255\n", "no pixels"),
        ("a.bmp", b"BM" + bytes(60), "BMP"),
        ("a.webp", b"RIFF\4\0\0\0WEBPVP8 ", "WEBP"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
    ],
)
def test_files_without_pixels(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    refuse(path, words)


def test_png_of_0x0(tmp_path: Path) -> None:
    refuse(write_png(tmp_path / "a.png", 0, 0, 8, 2, b""), "no pixels")


@pytest.mark.parametrize("chunk", [b"IHDR", b"IDAT"])
def test_png_with_a_bad_checksum(tmp_path: Path, chunk: bytes) -> None:
    path = write_png(tmp_path / "a.png", 2, 1, 8, 0, b"\0\1\2")
    data = bytearray(path.read_bytes())
    start = data.index(chunk)
    length = int.from_bytes(data[start - 4 : start])
    data[start + 4 + length] ^= 1
    path.write_bytes(data)
    refuse(path, "PNG")


def test_png_with_short_pixel_data(tmp_path: Path) -> None:
    refuse(write_png(tmp_path / "a.png", 2, 2, 8, 0, b"\0\1\2\0"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif", "jp2"])
def test_random_damage_is_an_image_error_or_an_image(tmp_path: Path, suffix: str) -> None:
    """No other exception, whatever the bytes; Pillow is not expected to notice every damage."""
    path = save(tmp_path / f"a.{suffix}", photograph())
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(20):
        damaged = whole.copy()
        damaged[rng.integers(0, min(200, damaged.size), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(ImageError):
            assert read_image(path).ndim == 3


# What is not a regular file


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder.jpg"
    folder.mkdir()
    refuse(folder, "is a folder")
    refuse(tmp_path / "absent.jpg", "does not exist")
    refuse(folder / "a.jpg" / "b.jpg", "does not exist")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "absent.jpg")
    refuse(tmp_path / "dangling.jpg", "link", "does not exist")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    refuse(tmp_path / "loop.jpg", "cannot be opened", "symbolic links")
    refuse(str(tmp_path / "null\0.jpg"), "cannot be opened")
    refuse(tmp_path / ("x" * 300 + ".jpg"), "cannot be opened")


@pytest.mark.timeout(10)
def test_fifo_and_socket_do_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    refuse(tmp_path / "fifo.jpg", "regular file")
    monkeypatch.chdir(tmp_path)  # a socket's path has to be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.jpg")
        refuse("s.jpg", "regular file")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(PIXELS))
    path.chmod(0)
    refuse(path, "Permission denied")


# The limit


@pytest.mark.parametrize("side", [9460, 12000, 30000, 2**31 - 1, 2**31])
def test_limit_is_checked_by_the_header(tmp_path: Path, side: int) -> None:
    path = write_png(tmp_path / "a.png", side, side, 8, 2, b"")  # no pixels: decoding would say so
    refuse(path, f"{side} x {side} = {side * side:,} pixels", f"{MAX_PIXELS:,}", "--max-pixels", "max_pixels=")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "gif", "ppm", "jp2"])
def test_limit_is_inclusive(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(PIXELS))
    assert read_image(path, max_pixels=6).shape == PIXELS.shape
    refuse(path, "3 x 2 = 6 pixels", "limit of 5;", max_pixels=5)
    with pytest.raises(ImageError, match="limit of 5;"):
        to_array(path, max_pixels=5)


def write_gif_with_a_frame_beyond_its_screen(path: Path, side: int) -> Path:
    frame = b"," + struct.pack("<4HB", 0, 0, side, side, 0) + b"\2\0;"
    path.write_bytes(b"GIF89a" + struct.pack("<2H3B", 1, 1, 0x80, 0, 0) + bytes(6) + frame)
    return path


def test_checks_inside_pillows_plugins_become_ours(tmp_path: Path) -> None:
    for side in (10000, 60000):  # Pillow warns, Pillow raises
        refuse(write_gif_with_a_frame_beyond_its_screen(tmp_path / "a.gif", side), "--max-pixels")


def test_raised_limit_reaches_pillow_and_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Pillow's limit were two pixels: it raises above four unless it is lifted."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    paths = [save(tmp_path / f"a.{suffix}", Image.fromarray(PIXELS)) for suffix in ("tif", "webp")]
    with pytest.raises(ImageError):
        read_image(paths[0])
    for path in paths:
        assert read_image(path, max_pixels=MAX_PIXELS + 1).shape == PIXELS.shape
    refuse(tmp_path, "folder", max_pixels=MAX_PIXELS + 1)
    refuse(write_png(tmp_path / "a.png", 9, 9, 8, 0, b""), max_pixels=MAX_PIXELS + 1)
    assert Image.MAX_IMAGE_PIXELS == 2


def test_raised_limit_in_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    path = save(tmp_path / "a.tif", Image.fromarray(PIXELS))
    shapes: list[tuple[int, ...]] = []

    def read() -> None:
        for _ in range(50):
            shapes.append(read_image(path, max_pixels=MAX_PIXELS + 1).shape)  # noqa: PERF401

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shapes == [PIXELS.shape] * 200
    assert Image.MAX_IMAGE_PIXELS == 2
