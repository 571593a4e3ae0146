"""Image files made byte by byte, and what a refusal must say."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpn_engine.errors import ImageError
from fpn_engine.images import read_image

# 2 x 3, no two pixels alike, so that every flip and rotation shows.
PIXELS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[9, 20, 30], [40, 50, 60], [70, 80, 90]]], dtype=np.uint8)
ORIENTATION_TAG = 0x0112


def write_png(path: Path, width: int, height: int, bits: int, colour: int, raw: bytes, *extra: bytes) -> Path:
    """A PNG of our own making; ``raw`` are the filtered rows, ``extra`` whole chunks before the pixels."""
    header = struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(raw)), png_chunk(b"IEND")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_tiff(path: Path, bits: int, sample_format: int, raw: bytes, photometric: int = 1) -> Path:
    """A little-endian one-row grey TIFF of two pixels."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 200), (277, 1), (278, 1)]
    tags += [(279, len(raw)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    path.write_bytes(header.ljust(200, b"\0") + raw)
    return path


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def photograph() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def refuse(path: str | os.PathLike[str], *words: str, **options: int) -> None:
    """The file is refused in one line that holds its name and all ``words``."""
    with pytest.raises(ImageError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert repr(os.fspath(path)) in message
    assert "\n" not in message
    for word in words:
        assert word in message
