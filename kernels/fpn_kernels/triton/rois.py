"""What both poolings do with a RoI before they read features: is there one, and on which level (eq. 1)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.levels import assign_levels
from fpn_kernels.triton.boxes import is_finite
from fpn_kernels.triton.levels import pack_sizes

ROWS = 4  # rows of bins that one program pools, one after another
TILE = 2048  # elements of a row of bins, such as 8 bins of 256 channels
WARP_ELEMENTS = 512  # of a tile, per warp: in half precision two 128-bit loads per tap and thread
NEIGHBOURS = 1 << 12  # float32 values around a boundary between levels; the rounding of eq. 1 moves it by a few


@triton.jit
def place_tile(
    C: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """What a program of a pooling's grid has to do, ROWS rows of BINS bins of a RoI.

    Returns: the RoI as int64, its first row and the one behind its last, the bins of a row, the channels (1, BLOCK_C),
    which of bins and channels there are, and where they lie in row 0 of (R, SIZE, SIZE, C).
    """
    x_parts: tl.constexpr = (SIZE + BINS - 1) // BINS
    y_parts: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    roi = (tl.program_id(0) // (x_parts * y_parts)).to(tl.int64)
    y_first = tl.program_id(0) // x_parts % y_parts * ROWS
    y_end = tl.minimum(y_first + ROWS, SIZE)
    x_bin = tl.program_id(0) % x_parts * BINS + tl.arange(0, BINS)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (x_bin < SIZE)[:, None] & (channels < C)[None, :]
    columns = channels[None, :]
    return roi, y_first, y_end, x_bin, columns, mask, roi * (SIZE * SIZE * C) + x_bin[:, None] * C + columns


@triton.jit
def load_roi(rois, counts, roi, slots, N, HAS_COUNTS: tl.constexpr):
    """Whether a RoI is to be pooled, its image and corners in pixels; ``roi`` is its row as int64."""
    image = tl.load(rois + roi * 5)
    x1 = tl.load(rois + roi * 5 + 1)
    y1 = tl.load(rois + roi * 5 + 2)
    x2 = tl.load(rois + roi * 5 + 3)
    y2 = tl.load(rois + roi * 5 + 4)
    finite = is_finite(x1) & is_finite(y1) & is_finite(x2) & is_finite(y2)
    present = finite & (image >= 0.0) & (image < N)
    if HAS_COUNTS:
        present &= roi % slots < tl.load(counts + roi // slots)
    return present, image, x1, y1, x2, y2


@triton.jit
def level_of(smallest, x1, y1, x2, y2):
    """Place of a box's level among the levels, by eq. 1."""
    size = tl.sqrt_rn((x2 - x1) * (y2 - y1))
    level = 0
    for i in tl.static_range(1, len(smallest)):
        level += (size >= smallest[i]).to(tl.int32)  # NaN, of an inverted box, stays on the finest level
    return level


@functools.lru_cache(maxsize=64)
def smallest_sizes(levels: int, min_level: int, canonical_level: int, canonical_size: float) -> tuple[float, ...]:
    """The least sqrt(w h) of each level's boxes, as float32 rounds eq. 1; so the kernels need no logarithm."""
    smallest = [0.0]
    for level in range(min_level + 1, min_level + levels):
        boundary = torch.tensor(canonical_size * 2.0 ** (level - canonical_level), device="cpu")
        steps = torch.arange(-NEIGHBOURS, NEIGHBOURS, dtype=torch.int32, device="cpu")
        sizes = (boundary.view(torch.int32) + steps).view(torch.float32)
        boxes = torch.stack([sizes * 0, sizes * 0, sizes, sizes], dim=1)
        assigned = assign_levels(boxes, level - 1, level, canonical_level, canonical_size)
        smallest.append(sizes[assigned == level].min().item())
    return tuple(smallest)


def to_nhwc(features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(N, C, H, W) levels as (N, H, W, C), copied only where they are not channels_last."""
    return tuple(level.permute(0, 2, 3, 1).contiguous() for level in features)


def pack_sides(tables: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Heights and widths of (N, H, W, C) levels, packed."""
    return pack_sizes(table.shape[1] for table in tables), pack_sizes(table.shape[2] for table in tables)


def tile_for(output_size: int, channels: int) -> dict[str, int]:
    """Bins and channels of a program's tile, and its warps."""
    bins = min(triton.next_power_of_2(output_size), 16)
    block = min(triton.next_power_of_2(channels), TILE // bins)
    return {"ROWS": ROWS, "BINS": bins, "BLOCK_C": block, "num_warps": max(bins * block // WARP_ELEMENTS, 1)}
