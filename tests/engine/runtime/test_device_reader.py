"""Decoding on the GPU, without one: which files go there, how they come back, and whose errors are told."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_engine.errors import BackendError, ImageError
from fpn_engine.images import read_image
from fpn_engine.runtime import device_reader
from fpn_engine.runtime.device_reader import DeviceReader
from tests.engine.image_files import ORIENTATION_TAG, PIXELS, photograph, save
from tests.engine.runtime.jpeg_stand_ins import RecordingDecoder, outcome, write
from tests.engine.test_jpeg import OTHER, PLAIN, encode

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def decoder() -> RecordingDecoder:
    return RecordingDecoder()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_are_decoded_there(name: str, decoder: RecordingDecoder, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", PLAIN[name])
    pixels = decoder.reader(path)
    assert isinstance(pixels, torch.Tensor)
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (torch.uint8, 3, 3)
    np.testing.assert_array_equal(pixels.numpy(), read_image(path))
    assert (len(decoder.given), decoder.left) == (1, 1)


@pytest.mark.parametrize("turn", [*range(10), 65535])
def test_upright_as_pillow_turns(turn: Any, decoder: RecordingDecoder, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = turn
    path = save(tmp_path / "a.jpg", photograph(), exif=exif)
    pixels = decoder.reader(path)
    assert isinstance(pixels, torch.Tensor)
    np.testing.assert_array_equal(pixels.numpy(), read_image(path))
    assert b"Exif" not in decoder.given[0], "the decoder would turn it once more"


@pytest.mark.parametrize("name", OTHER)
def test_other_files_are_pillows(name: str, decoder: RecordingDecoder, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", OTHER[name])
    found, refused = outcome(decoder.reader, path)
    expected, wanted = outcome(read_image, path)
    assert refused == wanted
    np.testing.assert_array_equal(found, expected)
    assert decoder.given == []


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "bmp", "gif", "ppm", "jp2"])
def test_so_are_other_formats(suffix: str, decoder: RecordingDecoder, tmp_path: Path) -> None:
    path = save(tmp_path / f"a.{suffix}", photograph())
    pixels = decoder.reader(str(path))
    assert isinstance(pixels, np.ndarray)
    np.testing.assert_array_equal(pixels, read_image(path))
    assert decoder.given == []


def test_the_first_of_a_cameras_images(decoder: RecordingDecoder, tmp_path: Path) -> None:
    path = tmp_path / "a.mpo"
    photograph().save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    pixels = decoder.reader(path)
    assert isinstance(pixels, torch.Tensor)
    np.testing.assert_array_equal(pixels.numpy(), read_image(path))
    assert decoder.given[0].count(b"\xff\xd8\xff") == 1


@pytest.mark.parametrize(
    "failure", [RuntimeError("nvjpegDecode failed: 2"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_what_the_decoder_refuses_goes_the_ordinary_way(
    failure: Exception, decoder: RecordingDecoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fpn_engine")
    path = save(tmp_path / "a.jpg", photograph())
    decoder.failure = failure
    pixels = decoder.reader(path)
    assert isinstance(pixels, np.ndarray)
    np.testing.assert_array_equal(pixels, read_image(path))
    assert [record.message for record in caplog.records] == [
        f"{str(path)!r} is decoded by Pillow: it is no JPEG that the GPU takes"
    ]
    assert isinstance(decoder.reader(path), torch.Tensor)


def test_another_size_than_the_header_says_is_refused_too(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", photograph())
    pixels = DeviceReader(lambda data: torch.zeros(3, 64, 79, dtype=torch.uint8))(path)
    np.testing.assert_array_equal(pixels, read_image(path))


def test_damage_is_told_as_ever(decoder: RecordingDecoder, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", photograph())
    whole = path.read_bytes()
    for part in (0.02, 0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(len(whole) * part)])
        refused = outcome(decoder.reader, path)[1]
        assert refused == outcome(read_image, path)[1] != ""
    (tmp_path / "folder.jpg").mkdir()
    for other in (tmp_path / "absent.jpg", tmp_path / "folder.jpg"):
        assert outcome(decoder.reader, other)[1] == outcome(read_image, other)[1] != ""
    assert decoder.given == []


def test_the_limit_is_checked_before(decoder: RecordingDecoder, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", encode())
    with pytest.raises(ImageError, match="80 x 64 = 5,120 pixels, above the limit of 5,119"):
        decoder.reader(path, max_pixels=5119)
    assert decoder.given == []
    assert isinstance(decoder.reader(path, max_pixels=5120), torch.Tensor)


def test_a_file_that_holds_more_than_an_image(
    decoder: RecordingDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jpg", encode())
    monkeypatch.setattr(device_reader, "MAX_BYTES", len(encode()) - 1)
    np.testing.assert_array_equal(decoder.reader(path), read_image(path))
    assert decoder.given == []


def test_images_in_memory_stay_there(decoder: RecordingDecoder) -> None:
    pixels = decoder.reader(PIXELS)
    assert isinstance(pixels, np.ndarray)
    assert np.shares_memory(pixels, PIXELS)
    np.testing.assert_array_equal(decoder.reader(Image.fromarray(PIXELS)), PIXELS)


@pytest.mark.parametrize("error", [BackendError("cuda:0 stopped working"), ZeroDivisionError()])
def test_a_broken_device_is_no_fault_of_the_file(error: Exception, decoder: RecordingDecoder, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def broken() -> Iterator[None]:
        yield
        raise error

    decoder.inside = 1
    with pytest.raises(type(error)):
        DeviceReader(decoder, broken)(save(tmp_path / "a.jpg", photograph()))
