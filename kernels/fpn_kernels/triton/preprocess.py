"""Normalise, resize and pad a batch of images in one launch; sizes and offsets are read from device memory.

Source positions are those of ``F.interpolate`` in float32: ``scale * (i + 0.5) - 0.5`` with one rounding, since its
compilers contract it. Bytes are resized and the result is normalised, not the other way round: the weights of a pixel
sum to 1, so the value is the reference's up to rounding, 4 eps of the largest, with a quarter of the divisions. These
are exact by two fused multiply-adds, since it is known beforehand by what. The batch is channels_last in memory, as
the trunk reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build

BLOCK = 256  # pixels of a row per program


@triton.jit
def _axis_taps(i, size, resized):
    """The two pixels that pixel ``i`` of the resized axis lies between, and the weight of the second."""
    scale = tl.div_rn(size.to(tl.float32), resized.to(tl.float32))
    position = tl.maximum(tl.fma(scale, i.to(tl.float32) + 0.5, -0.5), 0.0)
    low = tl.minimum(position.to(tl.int32), size - 1)
    weight = tl.minimum(position - low.to(tl.float32), 1.0)
    return low, tl.minimum(low + 1, size - 1), weight


@triton.jit
def _divide(value, by, reciprocal):
    """value / by, rounded once, given the rounded 1 / by: the remainder of a first try corrects it (Markstein 1990)."""
    first = value * reciprocal
    return tl.fma(tl.fma(-first, by, value), reciprocal, first)


@triton.jit(do_not_specialize=["H", "W"])
def preprocess_kernel(
    pixels, offsets, sizes, image_sizes, batch, H, W, mean, std, reciprocals,
    IS_REVERSED: tl.constexpr, IS_PLANAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(W / BLOCK), H, N). ``batch``: (N, H, W, 3). ``reciprocals``: float32 1 / std and 1 / 255."""
    image = tl.program_id(2).to(tl.int64)
    y = tl.program_id(1)
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    height = tl.load(sizes + 2 * image).to(tl.int32)
    width = tl.load(sizes + 2 * image + 1).to(tl.int32)
    resized_h = tl.load(image_sizes + 2 * image).to(tl.int32)
    resized_w = tl.load(image_sizes + 2 * image + 1).to(tl.int32)
    inside = x < tl.where(y < resized_h, resized_w, 0)
    top, bottom, y_weight = _axis_taps(y, height, resized_h)
    left, right, x_weight = _axis_taps(x, width, resized_w)

    step = 1 if IS_PLANAR else 3
    plane = height.to(tl.int64) * width if IS_PLANAR else 1
    source = pixels + tl.load(offsets + image)
    upper = source + top.to(tl.int64) * width * step
    lower = source + bottom.to(tl.int64) * width * step
    row = batch + ((image * H + y) * W) * 3
    for channel in tl.static_range(3):
        of = (2 - channel if IS_REVERSED else channel) * plane
        above = tl.load(upper + left * step + of, mask=inside, other=0).to(tl.float32) * (1.0 - x_weight)
        above += tl.load(upper + right * step + of, mask=inside, other=0).to(tl.float32) * x_weight
        below = tl.load(lower + left * step + of, mask=inside, other=0).to(tl.float32) * (1.0 - x_weight)
        below += tl.load(lower + right * step + of, mask=inside, other=0).to(tl.float32) * x_weight
        value = above * (1.0 - y_weight) + below * y_weight
        value = _divide(value, tl.full([BLOCK], 255.0, tl.float32), reciprocals[3]) - mean[channel]
        value = _divide(value, tl.zeros([BLOCK], tl.float32) + std[channel], reciprocals[channel])
        tl.store(row + x * 3 + channel, tl.where(inside, value, 0.0), mask=x < W)


def launch_preprocess(
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
    """As :func:`fpn_kernels.preprocess`, without a word to the host."""
    n, (h, w) = len(offsets), padded_size
    batch = torch.empty(n, h, w, 3, dtype=dtype, device=pixels.device)
    if batch.numel():
        preprocess_kernel[(triton.cdiv(w, BLOCK), h, n)](
            pixels.contiguous(), offsets.contiguous(), sizes.contiguous(), image_sizes.contiguous(), batch, h, w,
            tuple(map(float, mean)), tuple(map(float, std)), tuple(map(_reciprocal, (*std, 255.0))),
            IS_REVERSED=reverse_channels, IS_PLANAR=planar, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return batch.permute(0, 3, 1, 2)


def _reciprocal(value: float) -> float:
    """1 / value as float32 division rounds it."""
    return float(np.float32(1.0) / np.float32(value))


def _builds() -> Iterator[Build]:
    for is_planar, dtype in ((False, "fp16"), (False, "fp32"), (True, "fp16")):
        yield Build(
            kernel=preprocess_kernel,
            variant=f"{'CHW' if is_planar else 'HWC'}-{dtype}",
            signature={
                "pixels": "*u8", "offsets": "*i64", "sizes": "*i64", "image_sizes": "*i64", "batch": f"*{dtype}",
                "H": "i32", "W": "i32", "mean": ("fp32",) * 3, "std": ("fp32",) * 3, "reciprocals": ("fp32",) * 4,
            },
            constants={"IS_REVERSED": False, "IS_PLANAR": is_planar, "BLOCK": BLOCK},
        )  # fmt: skip


BUILDS = tuple(_builds())
