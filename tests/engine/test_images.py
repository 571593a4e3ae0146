"""Every pixel layout, orientation and frame of a good image file, with its values."""

import contextlib
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpn_engine.errors import ImageError
from fpn_engine.images import read_image, to_array
from tests.engine.image_files import ORIENTATION_TAG, PIXELS, photograph, png_chunk, refuse, save, write_png, write_tiff

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
