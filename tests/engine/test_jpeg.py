"""Plain JPEG files: which are, byte by byte, and that what is left of one decodes to the same pixels."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fpn_engine.jpeg import read_plain
from tests.engine.image_files import ORIENTATION_TAG, photograph

EXIF = Image.Exif()
EXIF[ORIENTATION_TAG] = 6


def encode(image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or photograph()).save(file, "JPEG", **options)
    return file.getvalue()


def decode(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def segment(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, 2 + len(payload)) + payload


def insert(file: bytes, *segments: bytes) -> bytes:
    """Behind the start."""
    return file[:2] + b"".join(segments) + file[2:]


def change_frame(file: bytes, at: int, value: int) -> bytes:
    """Another byte in the frame's segment: 0 is the marker, 4 the bits, 5 to 8 the size, 9 the components."""
    start = file.index(b"\xff\xc0")
    return file[: start + 1 + at] + bytes([value]) + file[start + 2 + at :]


PLAIN: dict[str, bytes] = {
    "4:2:0": encode(),
    "4:2:2": encode(subsampling=1),
    "4:4:4": encode(subsampling=0, quality=100),
    "progressive": encode(progressive=True),
    "restarts": encode(restart_marker_blocks=2),
    "grey": encode(photograph().convert("L")),
    "progressive grey": encode(photograph().convert("L"), progressive=True),
    "one pixel": encode(Image.new("RGB", (1, 1))),
    "comment": encode(comment=b"\xff\xd9 is no end here"),
    "EXIF": encode(exif=EXIF),
    "junk behind the end": encode() + b"\xff\xd8\xff junk",
    "another image behind the end": encode() + encode(),
    "fill bytes": encode()[:2] + b"\xff\xff" + encode()[2:],
    "Adobe's YCbCr": insert(encode(), segment(0xEE, b"Adobe" + bytes(6) + b"\1")),
    "Adobe's grey": insert(encode(photograph().convert("L")), segment(0xEE, b"Adobe" + bytes(7))),
    "a thumbnail in a segment": insert(encode(), segment(0xE2, encode(Image.new("RGB", (8, 8))))),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_decode_to_the_same_without_their_metadata(name: str) -> None:
    plain = read_plain(PLAIN[name])
    assert plain is not None
    assert plain.size == ((1, 1) if name == "one pixel" else (80, 64))
    np.testing.assert_array_equal(decode(plain.data), decode(PLAIN[name]))
    assert plain.data.endswith(b"\xff\xd9")
    with Image.open(io.BytesIO(plain.data)) as image:
        assert not image.getexif()
    assert read_plain(plain.data) == plain


WHOLE = PLAIN["4:2:0"]
OTHER: dict[str, bytes] = {
    "empty": b"",
    "two bytes": WHOLE[:2],
    "no JPEG": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "start and end": b"\xff\xd8\xff\xd9",
    "no end": WHOLE[:-2],
    "half an end": WHOLE[:-1],
    "a scan broken off": WHOLE[: len(WHOLE) * 9 // 10],
    "no scan": WHOLE[: WHOLE.index(b"\xff\xda")] + b"\xff\xd9",
    "a segment broken off": WHOLE[:30],
    "a segment of no length": insert(WHOLE, b"\xff\xe5\0\1"),
    "a segment beyond the end": insert(WHOLE, b"\xff\xe5\xff\xff"),
    "junk between segments": insert(WHOLE, b"junk"),
    "a second start": insert(WHOLE, b"\xff\xd8"),
    "a restart outside of a scan": insert(WHOLE, b"\xff\xd0"),
    "lines told later": WHOLE[:-2] + segment(0xDC, b"\0\x40") + WHOLE[-2:],
    "CMYK": encode(photograph().convert("CMYK")),
    "RGB by its names": encode(keep_rgb=True),
    "RGB by Adobe": insert(encode(), segment(0xEE, b"Adobe" + bytes(7))),
    "extended": change_frame(WHOLE, 0, 0xC1),
    "lossless": change_frame(WHOLE, 0, 0xC3),
    "arithmetic": change_frame(WHOLE, 0, 0xC9),
    "12 bits": change_frame(WHOLE, 3, 12),
    "no lines": change_frame(change_frame(WHOLE, 4, 0), 5, 0),
    "no columns": change_frame(change_frame(WHOLE, 6, 0), 7, 0),
    "more components than there are": change_frame(WHOLE, 8, 4),
    "a frame without components": insert(WHOLE, segment(0xC0, b"\x08\0\x40\0\x50")),
    "two frames": insert(WHOLE, WHOLE[WHOLE.index(b"\xff\xc0") :][:19]),
    "grey, sampled": change_frame(PLAIN["grey"], 10, 0x22),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_files_are_not(name: str) -> None:
    assert read_plain(OTHER[name]) is None


def test_no_damage_raises() -> None:
    whole = np.frombuffer(PLAIN["progressive"], np.uint8)
    rng = np.random.default_rng(0)
    plain = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, whole.size, 8)] = rng.integers(0, 256, 8)
        plain += read_plain(damaged[: rng.integers(2, whole.size + 1)].tobytes()) is not None
    assert plain < 300
