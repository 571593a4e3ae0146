"""Reading images for a CUDA device: plain JPEG files are decoded there, by TorchCodec's nvJPEG, all else by Pillow."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from PIL import Image
from torch import Tensor

from fpn_engine.errors import BackendError, ImageError
from fpn_engine.image_file import MAX_PIXELS, OpenImage, describe, open_image
from fpn_engine.images import decode_image, orientation, to_array
from fpn_engine.jpeg import read_plain
from fpn_engine.runtime.cuda import DECODING, explaining
from fpn_engine.tasks import AnyPixels

if TYPE_CHECKING:
    from fpn_engine.images import ImageLike

# The first with meta-pytorch/torchcodec#1634: before it the hardware decoder overwrote memory that was still read.
TORCHCODEC = "0.17"
MAX_BYTES = 1 << 28  # of a file that is read as a whole; larger ones hold something else beside an image
# torch hands these streams out apart from those that runners compute and upload on. What runs beside a trunk has one
# too: should both get the same of the 32, they wait for each other, and nothing else happens.
HIGH_PRIORITY = -1
PROBE_COLOUR, PROBE_SIDE, PROBE_TOLERANCE = (200, 100, 50), 32, 8

# EXIF orientation: whether rows and columns change places, then which of (rows, columns) are reversed.
_TURNS: dict[Any, tuple[bool, list[int]]] = {
    2: (False, [1]),
    3: (False, [0, 1]),
    4: (False, [0]),
    5: (True, []),
    6: (True, [1]),
    7: (True, [0, 1]),
    8: (True, [0]),
}

_LOGGER = logging.getLogger("fpn_engine")


class DeviceReader:
    """Reads images as :func:`fpn_engine.images.to_array` does, but plain JPEG files with another decoder.

    What the decoder refuses goes the ordinary way, so that errors are the same and a file that one of the two can read
    is read.

    Args:
        decode: the bytes of a JPEG file to its pixels, (3, H, W) uint8, not turned by EXIF; RuntimeError for what it
            refuses. apart: what it is called in; leaving it waits until the pixels are there, and raises BackendError
            where the device failed.
    """

    def __init__(
        self, decode: Callable[[bytes], Tensor], apart: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._decode = decode
        self._apart = apart

    def __call__(self, image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> AnyPixels:
        """(H, W, 3) uint8 RGB, upright: of a plain JPEG file a tensor on the device, with any strides.

        Raises: ImageError as ``to_array`` does, BackendError where the device failed.
        """
        if not isinstance(image, str | os.PathLike):
            return to_array(image, max_pixels=max_pixels)
        with open_image(image, max_pixels) as opened:
            if opened.image.format not in ("JPEG", "MPO"):
                return decode_image(opened)
            pixels = self._read_jpeg(opened)
            if pixels is None:
                _LOGGER.info("%s is decoded by Pillow: it is no JPEG that the GPU takes", opened.name)
            return decode_image(opened) if pixels is None else pixels

    def _read_jpeg(self, opened: OpenImage) -> Tensor | None:
        try:
            opened.file.seek(0)
            jpeg = read_plain(opened.file.read(MAX_BYTES))
        except OSError as error:
            raise ImageError(f"{opened.name} cannot be read: {describe(error)}") from error
        if jpeg is None or jpeg.size != opened.image.size:
            return None
        pixels = None
        with self._apart():
            try:
                planes = self._decode(jpeg.data)
                if planes.shape == (3, *jpeg.size[::-1]):
                    pixels = turn(planes.permute(1, 2, 0), orientation(opened.image))
            except RuntimeError as error:  # all that TorchCodec raises, and torch for a lack of memory
                _LOGGER.debug("%s: %s", opened.name, error)
        return pixels


def turn(pixels: Tensor, exif: Any) -> Tensor:
    """Upright by an EXIF orientation, (H, W, 3) to (H', W', 3); what is no orientation turns nothing."""
    is_transposed, reversed_axes = _TURNS.get(exif, (False, []))
    if is_transposed:
        pixels = pixels.transpose(0, 1)
    return pixels.flip(reversed_axes) if reversed_axes else pixels


def make_cuda_reader(device: torch.device) -> DeviceReader:
    """A reader that decodes on a CUDA device.

    Raises: BackendError where TorchCodec is missing, older than ``TORCHCODEC``, or decodes nothing there.
    """
    decode_jpeg = load_torchcodec()

    def decode(data: bytes) -> Tensor:
        # Of bytes TorchCodec makes a tensor itself, and hides torch's warning by a switch that threads share.
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB", device=device)

    apart = _Apart(device)
    with apart():
        probe(decode, device)
    return DeviceReader(decode, apart)


def load_torchcodec() -> Callable[..., Tensor]:
    """TorchCodec's ``decode_jpeg``. Raises: BackendError, one sentence with the remedy."""
    wanted = f"decoding on the GPU needs TorchCodec {TORCHCODEC} or later"
    remedy = f"pip install 'torchcodec>={TORCHCODEC}', or leave --decode gpu (decode='gpu') out"
    try:
        found = version("torchcodec")
    except PackageNotFoundError:
        raise BackendError(f"{wanted}, which is not installed; {remedy}") from None
    if Version(found) < Version(TORCHCODEC):
        raise BackendError(f"{wanted}, and {found} is installed; {remedy}")
    try:
        decode: Callable[..., Tensor] = importlib.import_module("torchcodec.decoders").decode_jpeg
    except Exception as error:  # its libraries fail in as many ways as there are versions of torch beside it
        raise BackendError(f"TorchCodec {found} cannot be imported ({_first_line(error)}); {remedy}") from error
    return decode


def probe(decode: Callable[[bytes], Tensor], device: torch.device) -> None:
    """Decode a small picture: a decoder that refuses this would leave every file to Pillow, and nobody would know.

    Raises: BackendError.
    """
    file = io.BytesIO()
    Image.new("RGB", (PROBE_SIDE, PROBE_SIDE), PROBE_COLOUR).save(file, "JPEG", quality=95)
    try:
        pixels = decode(file.getvalue()).cpu()
    except RuntimeError as error:
        reason = _first_line(error)
    else:
        colour = torch.tensor(PROBE_COLOUR)[:, None, None]
        if pixels.shape == (3, PROBE_SIDE, PROBE_SIDE) and (pixels - colour).abs().max() <= PROBE_TOLERANCE:
            return
        reason = "a plain picture came out wrong"
    raise BackendError(
        f"TorchCodec cannot decode JPEG on {device} ({reason}); install its build for CUDA, "
        "or leave --decode gpu (decode='gpu') out"
    )


class _Apart:
    """A stream of each thread's own, since TorchCodec waits for the current one; and no capture meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_thread = threading.local()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with explaining(self._device), torch.cuda.device(self._device):
            stream = getattr(self._of_thread, "stream", None)
            if stream is None:
                stream = self._of_thread.stream = torch.cuda.Stream(priority=HIGH_PRIORITY)
            with DECODING.together():
                with torch.cuda.stream(stream):
                    yield
                stream.synchronize()  # of turning; where the decoder broke the device, this says so


def _first_line(error: Exception) -> str:
    """What an error says, without the place in TorchCodec's sources that it begins with."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\w+, \S+:\d+, ", "", line)
