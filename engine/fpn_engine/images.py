"""Images on their way in: a file, array, PIL image or tensor becomes (H, W, 3) uint8 RGB, upright."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from fpn_engine.errors import ImageError
from fpn_engine.image_file import MAX_PIXELS, OpenImage, describe, open_image

if TYPE_CHECKING:  # torch takes seconds to import and reading files does not need it
    import torch

    ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any] | torch.Tensor

_LOGGER = logging.getLogger("fpn_engine")
_ALLOWED = "uint8, (H, W, 3) RGB, (H, W, 4) RGBA, (H, W) or (H, W, 1) grey"
_ALLOWED_TENSOR = "uint8, (3, H, W) or (H, W, 3) RGB, (H, W) grey"

# Pillow converts these to RGB wrongly, with a warning, or not at all in one step.
_CONVERT_FIRST = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_array(image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels of any image a caller may hold, as (H, W, 3) uint8 RGB, C-contiguous, upright.

    A contiguous (H, W, 3) uint8 array is returned without a copy. Alpha is dropped. Floating and 16-bit
    arrays are refused: their scale (0..1, 0..255, 12 or 16 bits) cannot be told from their values.

    Args:
        image: one of
            a path, read by :func:`read_image`;
            a PIL image of any mode that :func:`read_image` takes, EXIF orientation applied;
            a uint8 array, (H, W, 3) RGB, (H, W, 4) RGBA, (H, W) or (H, W, 1) grey;
            a uint8 tensor on any device, (3, H, W) as torchvision has it, (H, W, 3), or (H, W) grey.
        max_pixels: for a path, see :func:`read_image`.
    Raises: ImageError with what was given and what is allowed.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image, max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        return _decode(image, "the image")
    if isinstance(image, np.ndarray):
        return _from_array(image)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(image, torch.Tensor):
        return _from_tensor(image)
    raise ImageError(f"an image is a path, PIL image, array or tensor, not {type(image).__name__}")


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image file as (H, W, 3) uint8 RGB, C-contiguous, upright by its EXIF orientation.

    Only complete files are accepted. Of several frames the first is taken, with a warning in the log.
    Colours are those of Pillow's ``convert("RGB")``: alpha and colour keys are dropped, as OpenCV and
    torchvision do too, since detectors were trained on that and not on an invented background; CMYK is
    converted without a profile; 16-bit colour keeps its high byte. Only 16-bit grey differs: scaled,
    round(v / 257), not clipped at 255. Integers of 32 bits and floats are refused, as their scale is
    unknown. A garbage orientation is ignored; Pillow's UserWarnings on damaged metadata pass through.

    Args:
        path: a regular file, or a link to one, in one of ``image_file.FORMATS``.
        max_pixels: refuse an image with more pixels, by its header, before anything is decoded. It alone
            decides: above Pillow's own limit, Pillow's is lifted for the process while this reads.
    Raises: ImageError, one sentence with the name of the file.
    """
    with open_image(path, max_pixels) as opened:
        return decode_image(opened)


def decode_image(opened: OpenImage) -> NDArray[np.uint8]:
    """Decode the first frame of an opened file; the rules are in :func:`read_image`."""
    rgb = _decode(opened.image, opened.name)
    if _has_more_frames(opened.image):
        _LOGGER.warning("%s has more than one frame; only the first is used", opened.name)
    return rgb


def _decode(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Decode ``image`` to (H, W, 3) uint8 RGB, upright; the rules are in :func:`read_image`."""
    _require_known_scale(image, name)
    try:
        image.load()  # before the orientation is read: a TIFF turns itself
        upright = _UPRIGHT.get(orientation(image))
        if image.mode.startswith("I"):
            image = Image.fromarray(_scale_16_bit(np.asarray(image)))
        if image.mode in _CONVERT_FIRST:
            image = image.convert(_CONVERT_FIRST[image.mode])
        if image.mode != "RGB":
            image = image.convert("RGB")
        return np.array(image if upright is None else image.transpose(upright))
    except Exception as error:  # whatever a decoder stumbles over in hostile bytes
        raise ImageError(f"{name} cannot be decoded: {describe(error)}") from error


def _require_known_scale(image: Image.Image, name: str) -> None:
    """Refuse pixels of which nothing says what is black and what is white."""
    kind = ""
    if image.mode == "F":
        kind = "floating-point"
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # there "I" is how 16 bits are opened
        kind = "32-bit or signed integer"
    elif image.mode.startswith("I;16") and image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if tags.get(ExifTags.Base.BitsPerSample) != (16,):
            kind = "12-bit"
        elif tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
            kind = "inverted 16-bit"
    if kind:
        raise ImageError(f"{name} has {kind} pixels, whose scale is unknown; save it with 8 bits per channel")


def _scale_16_bit(grey: NDArray[Any]) -> NDArray[np.uint8]:
    """round(v / 257): 65535 is 255 * 257, so k * 257 becomes k; there are no ties, 257 being odd."""
    return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)


def orientation(image: Image.Image) -> Any:
    """The EXIF orientation; garbage there is common in old photographs and no reason to lose them."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None


def _has_more_frames(image: Image.Image) -> bool:
    try:  # MPO: a photograph and its previews, which no one would miss
        return getattr(image, "is_animated", False) and image.format != "MPO"
    except Exception:  # there is a second frame, but a damaged one
        return True


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    given = f"an array of {array.dtype}, shape {array.shape}"
    _require_uint8(array.dtype == np.uint8, given, _ALLOWED)
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        hint = "; use transpose(1, 2, 0)" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"{given} is not an image: it must be {_ALLOWED}{hint}")
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])


def _from_tensor(tensor: torch.Tensor) -> NDArray[np.uint8]:
    shape = tuple(tensor.shape)
    given = f"a tensor of {tensor.dtype}, shape {shape}"
    _require_uint8(str(tensor.dtype) == "torch.uint8", given, _ALLOWED_TENSOR)
    channels_first = len(shape) == 3 and shape[0] == 3
    channels_last = len(shape) == 3 and shape[2] == 3
    if channels_first and channels_last:
        raise ImageError(f"{given} can be read as (3, H, W) or (H, W, 3); give an (H, W, 3) NumPy array")
    if not (channels_first or channels_last or len(shape) == 2):
        raise ImageError(f"{given} is not an image: it must be {_ALLOWED_TENSOR}, one image at a time")
    return _from_array((tensor.permute(1, 2, 0) if channels_first else tensor).cpu().numpy())


def _require_uint8(ok: bool, given: str, allowed: str) -> None:
    if not ok:
        remedy = "scale it, e.g. (image * 255).round() for 0..1 or image / 257 for 16 bits, and cast to uint8"
        raise ImageError(f"{given} is refused, as its scale is unknown: it must be {allowed}; {remedy}")
