"""Every fault of an image file, made here byte by byte, and every pixel layout with its values."""

import contextlib
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fpn_engine.errors import ImageError
from fpn_engine.images import FORMATS, MAX_PIXELS, read_image, to_array

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


# Good files


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tif", "webp", "jp2"])
def test_lossless_formats_give_their_pixels(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(PIXELS), lossless=True)
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable  # torch.from_numpy warns otherwise
    np.testing.assert_array_equal(image, PIXELS)


def test_jpeg_is_what_pillow_decodes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", photograph(), quality=90)
    with Image.open(path) as image:
        np.testing.assert_array_equal(read_image(str(path)), np.asarray(image))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 4000), (8000, 1)])
def test_extreme_shapes(tmp_path: Path, width: int, height: int) -> None:
    path = save(tmp_path / "a.png", Image.new("RGB", (width, height), (1, 2, 3)))
    image = read_image(path)
    assert image.shape == (height, width, 3)
    assert (image == (1, 2, 3)).all()


@pytest.mark.parametrize("name", ["new\nline.png", "günther 図.png", "lone\udcff.png", "no suffix"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(PIXELS)).rename(tmp_path / name)
    np.testing.assert_array_equal(read_image(path), PIXELS)
    path.write_bytes(b"nonsense")
    refuse(path, "not an image in a known format")


def test_link_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(save(tmp_path / "a.png", Image.fromarray(PIXELS)))
    np.testing.assert_array_equal(read_image(tmp_path / "link.png"), PIXELS)


# Modes


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 150, 100])
    image.putpixel((1, 0), 1)
    return image


PALETTE_RGB = [[10, 20, 30], [200, 150, 100]]


@pytest.mark.parametrize(
    ("suffix", "image", "expected"),
    [
        ("png", Image.frombytes("1", (2, 1), b"\x40"), [[0] * 3, [255] * 3]),
        ("png", Image.frombytes("L", (2, 1), bytes([7, 250])), [[7] * 3, [250] * 3]),
        ("png", Image.frombytes("LA", (2, 1), bytes([7, 0, 250, 128])), [[7] * 3, [250] * 3]),
        ("png", Image.frombytes("RGBA", (2, 1), bytes([9, 8, 7, 0, 1, 2, 3, 99])), [[9, 8, 7], [1, 2, 3]]),
        ("png", palette_image(), PALETTE_RGB),
        ("gif", palette_image(), PALETTE_RGB),
        ("tif", Image.frombytes("CMYK", (2, 1), bytes(4) + b"\xff\0\0\0"), [[255] * 3, [0, 255, 255]]),
    ],
    ids=["1", "L", "LA", "RGBA", "P", "gif", "CMYK"],
)
def test_modes(tmp_path: Path, suffix: str, image: Image.Image, expected: list[list[int]]) -> None:
    path = save(tmp_path / f"a.{suffix}", image)
    assert read_image(path).tolist() == [expected]
    assert to_array(image).tolist() == [expected]


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])], ids=["index", "bytes"])
def test_palette_with_transparency_keeps_its_colours(tmp_path: Path, transparency: int | bytes) -> None:
    path = save(tmp_path / "a.png", palette_image(), transparency=transparency)
    with Image.open(path) as image:
        assert "transparency" in image.info
    assert read_image(path).tolist() == [PALETTE_RGB]


def test_colour_key_is_dropped(tmp_path: Path) -> None:
    key = png_chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))
    path = write_png(tmp_path / "a.png", 2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 4, 5, 6]), key)
    assert read_image(path).tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_cmyk_jpeg_with_adobe_marker(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    np.testing.assert_allclose(read_image(path), np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=3)


VALUES_16 = [*range(0, 65536, 257), 1, 128, 129, 256, 385, 386, 4095, 65406, 65407, 65534]


@pytest.mark.parametrize("kind", ["png", "pgm", "tif", "big-endian tif"])
def test_16_bit_grey_is_scaled_by_257(tmp_path: Path, kind: str) -> None:
    values = np.array([VALUES_16], dtype=np.uint16)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert expected[0, :256].tolist() == list(range(256))
    if kind == "png":
        path = write_png(tmp_path / "a.png", values.size, 1, 16, 0, b"\0" + values.astype(">u2").tobytes())
    elif kind == "pgm":
        path = tmp_path / "a.pgm"
        path.write_bytes(b"P5 %d 1 65535\n" % values.size + values.astype(">u2").tobytes())
    else:
        mode, dtype = ("I;16", "<u2") if kind == "tif" else ("I;16B", ">u2")
        image = Image.frombytes(mode, (values.size, 1), values.astype(dtype).tobytes())
        path = save(tmp_path / "a.tif", image)
    np.testing.assert_array_equal(read_image(path), np.stack([expected] * 3, axis=-1))


def test_16_bit_colour_keeps_its_high_byte(tmp_path: Path) -> None:
    values = [0, 257 * 7, 65535]
    path = write_png(tmp_path / "a.png", 1, 1, 16, 2, b"\0" + struct.pack(">3H", *values))
    assert read_image(path).tolist() == [[[0, 7, 255]]]


@pytest.mark.parametrize(
    ("bits", "sample_format", "raw", "photometric", "kind"),
    [
        (32, 3, struct.pack("<2f", 0.0, 1.0), 1, "floating-point"),
        (32, 1, struct.pack("<2I", 0, 1 << 31), 1, "32-bit"),
        (32, 2, struct.pack("<2i", -1, 1), 1, "32-bit or signed"),
        (16, 2, struct.pack("<2h", -1, 1), 1, "signed"),
        (12, 1, b"\0\x1f\xff", 1, "12-bit"),
        (16, 1, struct.pack("<2H", 0, 65535), 0, "inverted"),
    ],
)
def test_pixels_of_unknown_scale_are_refused(
    tmp_path: Path, bits: int, sample_format: int, raw: bytes, photometric: int, kind: str
) -> None:
    refuse(write_tiff(tmp_path / "a.tif", bits, sample_format, raw, photometric), kind, "8 bits")


def test_own_tiff_writer_makes_good_files(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", 16, 1, struct.pack("<2H", 257, 65535))
    assert read_image(path).tolist() == [[[1] * 3, [255] * 3]]


# Orientation

UPRIGHT = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: np.rot90(PIXELS, -1),
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(PIXELS, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "tif", "lzw", "pil"])
def test_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    options = {"compression": "tiff_lzw"} if kind == "lzw" else {}
    suffix = "png" if kind in ("png", "pil") else "tif"
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(PIXELS), exif=exif, **options)
    with Image.open(path) as opened:
        image = to_array(opened if kind == "pil" else path)
    np.testing.assert_array_equal(image, UPRIGHT[orientation])
    assert image.flags.c_contiguous


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_of_a_jpeg_turns_corners_the_way_a_viewer_does(tmp_path: Path, orientation: int) -> None:
    corners = np.zeros((32, 48, 3), dtype=np.uint8)
    corners[:16, :16] = 255  # as stored, the top left
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    image = read_image(save(tmp_path / "a.jpg", Image.fromarray(corners), exif=exif))
    assert image.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    # Exif 2.32, table 6: where row 0 and column 0 of the stored image are seen.
    top, left = [(0, 0), (0, -1), (-1, -1), (-1, 0), (0, 0), (0, -1), (-1, -1), (-1, 0)][orientation - 1]
    assert image[top, left].min() > 250
    assert image[-1 - top, -1 - left].max() < 5


def tiff_exif(kind: int, count: int, value: bytes) -> bytes:
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI", ORIENTATION_TAG, kind, count) + value + bytes(4)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")  # Pillow's own about damaged metadata
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"garbage everywhere",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01\x02\0\xff\0\0\0\xf0\0\0\0",
        tiff_exif(3, 1, b"\0\x63\0\0"),
        tiff_exif(2, 4, b"abc\0"),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_garbage_exif_is_ignored(tmp_path: Path, suffix: str, exif: bytes) -> None:
    image = Image.new("RGB", (24, 8), (200, 200, 200))
    plain = read_image(save(tmp_path / f"plain.{suffix}", image))
    np.testing.assert_array_equal(read_image(save(tmp_path / f"a.{suffix}", image, exif=exif)), plain)


# Frames


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_first_frame_with_one_warning(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    with caplog.at_level(logging.WARNING, "fpn_engine"):
        image = read_image(path)
    assert (image == (255, 0, 0)).all()
    assert [record.name for record in caplog.records] == ["fpn_engine"]
    assert repr(str(path)) in caplog.text


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_damaged_second_frame_does_not_cost_the_first(tmp_path: Path, cut: int) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    path.write_bytes(path.read_bytes()[:-cut])
    with contextlib.suppress(ImageError):  # some cut into the first
        assert (read_image(path) == (255, 0, 0)).all()


def test_single_frame_does_not_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for suffix in ("gif", "tif", "png", "jpg"):
        read_image(save(tmp_path / f"a.{suffix}", Image.new("RGB", (4, 3))))
    assert not caplog.records


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


# to_array


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
