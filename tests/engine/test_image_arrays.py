"""Arrays, tensors and PIL images as input."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_engine.errors import ImageError
from fpn_engine.image_file import FORMATS
from fpn_engine.images import to_array
from tests.engine.image_files import PIXELS, photograph, save


def test_contiguous_rgb_is_not_copied() -> None:
    pixels = PIXELS.copy()
    assert np.shares_memory(to_array(pixels), pixels)


def test_arrays() -> None:
    grey = PIXELS[..., 0]
    three = np.stack([grey] * 3, axis=-1)
    rgba = np.dstack([PIXELS, np.full((2, 3), 7, dtype=np.uint8)])
    given = [PIXELS[:, ::-1], grey, grey[..., None], rgba]
    for array, expected in zip(given, [PIXELS[:, ::-1], three, three, PIXELS], strict=True):
        image = to_array(array)
        assert image.flags.c_contiguous
        np.testing.assert_array_equal(image, expected)


def test_tensors() -> None:
    hwc = torch.from_numpy(PIXELS.copy())
    wide = hwc.repeat(2, 2, 1)  # (4, 6, 3)
    for tensor in (wide, wide.permute(2, 0, 1), wide.permute(2, 0, 1).contiguous()):
        image = to_array(tensor)
        assert image.flags.c_contiguous
        np.testing.assert_array_equal(image, np.tile(PIXELS, (2, 2, 1)))
    np.testing.assert_array_equal(to_array(hwc[..., 1]), np.stack([PIXELS[..., 1]] * 3, axis=-1))
    assert to_array(torch.zeros(3, 1, 1, dtype=torch.uint8)).shape == (1, 1, 3)


def test_pil_image() -> None:
    assert to_array(Image.fromarray(PIXELS)).tolist() == PIXELS.tolist()
    premultiplied = Image.fromarray(PIXELS).convert("RGBA").convert("RGBa")
    assert to_array(premultiplied).tolist() == PIXELS.tolist()
    with pytest.raises(ImageError, match="floating-point"):
        to_array(Image.new("F", (2, 2)))
    with pytest.raises(ImageError, match="32-bit"):
        to_array(Image.new("I", (2, 2)))


def test_pil_image_of_a_truncated_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", photograph())
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as image, pytest.raises(ImageError, match="truncated"):
        to_array(image)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 5, 3), dtype=np.float32), ["float32", r"\(4, 5, 3\)", r"\(image \* 255\)\.round"]),
        (np.zeros((4, 5, 3), dtype=np.uint16), ["uint16", "/ 257"]),
        (np.zeros((4, 5), dtype=bool), ["bool"]),
        (np.zeros((3, 8, 9), dtype=np.uint8), [r"\(3, 8, 9\)", r"transpose\(1, 2, 0\)"]),
        (np.zeros((1, 8, 9, 3), dtype=np.uint8), [r"\(1, 8, 9, 3\)"]),
        (np.zeros((8, 9, 2), dtype=np.uint8), [r"\(8, 9, 2\)"]),
        (np.zeros((0, 9, 3), dtype=np.uint8), [r"\(0, 9, 3\)"]),
        (np.zeros((0, 0), dtype=np.uint8), [r"\(0, 0\)"]),
        (torch.zeros(3, 4, 5), ["torch.float32", r"\* 255"]),
        (torch.zeros(3, 7, 3, dtype=torch.uint8), [r"\(3, 7, 3\)", "NumPy"]),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), ["one image at a time"]),
        (torch.zeros(1, 4, 5, dtype=torch.uint8), [r"\(1, 4, 5\)"]),
        (torch.zeros(3, 0, 5, dtype=torch.uint8), [r"\(0, 5, 3\)"]),
        ([[1, 2], [3, 4]], ["list"]),
        (b"bytes.jpg", ["bytes"]),
        (None, ["NoneType"]),
    ],
)
def test_refused_inputs(image: object, words: list[str]) -> None:
    for word in words:
        with pytest.raises(ImageError, match=word):
            to_array(image)  # type: ignore[arg-type]


def test_reading_does_not_import_torch(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(PIXELS))
    code = "import sys; from fpn_engine.images import to_array; to_array(sys.argv[1]); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_formats_are_pillows() -> None:
    Image.init()
    assert set(FORMATS) <= {*Image.OPEN, "AVIF"}  # AVIF came with Pillow 11.3
