"""Preprocess: uint8 images of any size to one normalised, resized and padded batch (Lin et al. 2017, sec. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.checks import FLOATS, require, require_device, require_dtype, require_shape
from fpn_kernels.registration import Op


class PackedImages(NamedTuple):
    """Images of different sizes in one buffer, so that one upload and one launch serve them all.

    Attributes:
        pixels: (B,) uint8, the images one after another, each (H, W, 3) row-major, or (3, H, W) if planar.
        offsets: (N,) int64, where each image begins in ``pixels``.
        sizes: (N, 2) int64, height and width of each in pixels.
    """

    pixels: Tensor
    offsets: Tensor
    sizes: Tensor


def pack_images(images: Sequence[Tensor], *, planar: bool = False) -> PackedImages:
    """Lay images of any sizes one after another.

    Args: images, each (H, W, 3) or, if ``planar``, (3, H, W) uint8 with at least one pixel.
    Returns: the images in one buffer.
    Raises: ValueError if dtype or shape differ from the above.
    """
    for image in images:
        require_shape("image", image, *((3, None, None) if planar else (None, None, 3)))
        require_dtype("image", image, torch.uint8)
        require(image.numel() > 0, "image must have at least one pixel, not shape {}", tuple(image.shape))
    sides = [image.shape[1:] if planar else image.shape[:2] for image in images]
    sizes = torch.tensor(sides, dtype=torch.int64).reshape(-1, 2)
    ends = (sizes.prod(dim=1) * 3).cumsum(dim=0)
    flat = [image.reshape(-1) for image in images] or [torch.empty(0, dtype=torch.uint8)]
    pixels = torch.cat(flat) if len(flat) > 1 else flat[0]
    return PackedImages(pixels, ends - sizes.prod(dim=1) * 3, sizes)


def preprocess_reference(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    image_sizes: Tensor,
    padded_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    reverse_channels: bool,
    planar: bool,
    dtype: torch.dtype,
) -> Tensor:
    batch = torch.zeros(len(offsets), 3, *padded_size, dtype=dtype, device=pixels.device)
    mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=pixels.device)[:, None, None] for v in (mean, std))
    rows = zip(offsets.tolist(), sizes.tolist(), image_sizes.tolist(), strict=True)
    for out, (offset, (h, w), (resized_h, resized_w)) in zip(batch, rows, strict=True):
        image = pixels[offset : offset + h * w * 3]
        image = image.view(3, h, w) if planar else image.view(h, w, 3).permute(2, 0, 1)
        if reverse_channels:
            image = image.flip(0)
        image = (image.to(torch.float32, memory_format=torch.contiguous_format) / 255 - mean_) / std_
        out[:, :resized_h, :resized_w] = F.interpolate(
            image[None], size=(resized_h, resized_w), mode="bilinear", align_corners=False
        )[0]
    return batch


def _fake(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    image_sizes: Tensor,
    padded_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    reverse_channels: bool,
    planar: bool,
    dtype: torch.dtype,
) -> Tensor:
    order = torch.contiguous_format if pixels.device.type == "cpu" else torch.channels_last
    return torch.empty(offsets.shape[0], 3, *padded_size, dtype=dtype, device=pixels.device, memory_format=order)


_preprocess = Op(
    "preprocess",
    "(Tensor pixels, Tensor offsets, Tensor sizes, Tensor image_sizes, SymInt[] padded_size, float[] mean, "
    "float[] std, bool reverse_channels, bool planar, ScalarType dtype) -> Tensor",
    preprocess_reference,
    "fpn_kernels.triton.preprocess:launch_preprocess",
    _fake,
)


def preprocess(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    image_sizes: Tensor,
    padded_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    reverse_channels: bool = False,
    planar: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise, resize and pad a batch of packed images.

    Per image, in float32: x = (uint8 / 255 - mean) / std, then bilinear resizing with source scale
    in / out (align_corners=False, no antialias, no rounding to uint8), then zeros on the right and bottom.
    Sizes are read from device memory, so that one captured graph serves images of any size.

    Args:
        pixels: (B,) uint8; offsets: (N,) int64; sizes: (N, 2) int64: see :class:`PackedImages`.
        image_sizes: (N, 2) int64, resized height and width in pixels, at most ``padded_size``.
        padded_size: height and width of the batch in pixels.
        mean, std: per channel, in the network's channel order, for values in 0..1.
        reverse_channels: True for networks that want BGR.
        planar: the images are packed as (3, H, W).
        dtype: of the result; the arithmetic is float32.
    Returns: (N, 3, *padded_size), ``dtype``; contiguous from the CPU, channels_last from CUDA.
    Raises: ValueError if shape, dtype or device differ from the above.
    """
    n = offsets.shape[0]
    require_shape("pixels", pixels, None)
    require_shape("offsets", offsets, n)
    require_shape("sizes", sizes, n, 2)
    require_shape("image_sizes", image_sizes, n, 2)
    require_dtype("pixels", pixels, torch.uint8)
    for name, tensor in (("offsets", offsets), ("sizes", sizes), ("image_sizes", image_sizes)):
        require_dtype(name, tensor, torch.int64)
    require_device(pixels=pixels, offsets=offsets, sizes=sizes, image_sizes=image_sizes)
    require(len(mean) == 3 and len(std) == 3, "mean and std must have three numbers, not {} and {}", mean, std)
    require(min(padded_size) >= 1, "padded_size must be positive, not {}", padded_size)
    require(dtype in FLOATS, "dtype must be float32, float16 or bfloat16, not {}", dtype)
    return _preprocess(
        pixels.device,
        pixels,
        offsets,
        sizes,
        image_sizes,
        list(padded_size),
        [float(m) for m in mean],
        [float(s) for s in std],
        reverse_channels,
        planar,
        dtype,
    )
