"""RoIAlign of all levels in one launch: a program pools a row of bins of one RoI, all channels at a time.

Coordinates and weights are computed as the reference does, in float32 without fused multiply-adds, once per program;
each tap is then a 128-bit load per eight (four, in float32) channels and an explicit fused multiply-add in float32. The
gradient runs through the same kernel with atomic additions, in float32 and in any order, in place of the loads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.roi_align import MAX_GRID
from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.levels import pick_pointer, pick_size
from fpn_kernels.triton.rois import level_of, load_roi, pack_sides, place_tile, smallest_sizes, tile_for, to_nhwc

UNROLLED = 2  # samples per bin and axis up to which all taps are laid out, to be in flight together


@triton.jit
def _divide(x, grid, GRID: tl.constexpr):
    """x / grid, correctly rounded; a product where the number of samples is a known power of two."""
    if GRID > 0:
        return x * (1.0 / GRID)
    else:
        return tl.div_rn(x, grid)


@triton.jit
def _axis_taps(start, bin_size, bins, step, grid, length, GRID: tl.constexpr):
    """Sample ``step`` of ``bins``: the two cells it lies between and their weights, 0 outside [-1, length]."""
    position = start + bins * bin_size + _divide((step + 0.5) * bin_size, grid, GRID)
    inside = (position >= -1.0) & (position <= length)
    position = tl.minimum(tl.maximum(position, 0.0), length - 1)
    low = tl.minimum(tl.floor(position), tl.maximum(length - 2, 0))
    high = tl.minimum(low + 1, length - 1)
    low_weight = tl.where(inside, 1.0 - (position - low), 0.0)
    high_weight = tl.where(inside, position - low, 0.0)
    return low.to(tl.int32), high.to(tl.int32), low_weight, high_weight


@triton.jit
def _visit_cells(tile, cells, weight, mask, IS_BACKWARD: tl.constexpr):
    """Add weighted cells to the tile of bins or, backward, the weighted tile to the cells."""
    weight = tl.broadcast_to(weight[:, None], tile.shape)
    if IS_BACKWARD:
        tl.atomic_add(cells, weight * tile, mask=mask, sem="relaxed")
        return tile
    else:
        return tl.fma(weight, tl.load(cells, mask=mask).to(tl.float32), tile)


@triton.jit
def _visit_samples(
    tile, top, bottom, top_weight, bottom_weight, x1, bin_w, x_bin, step, grid, width, columns, mask,
    C: tl.constexpr, GRID: tl.constexpr, IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    """One sample of each bin of a row, between two rows of cells."""
    left, right, left_weight, right_weight = _axis_taps(x1, bin_w, x_bin, step, grid, width, GRID)
    left = left[:, None] * C + columns
    right = right[:, None] * C + columns
    tile = _visit_cells(tile, top + left, top_weight * left_weight, mask, IS_BACKWARD)
    tile = _visit_cells(tile, bottom + left, bottom_weight * left_weight, mask, IS_BACKWARD)
    tile = _visit_cells(tile, top + right, top_weight * right_weight, mask, IS_BACKWARD)
    tile = _visit_cells(tile, bottom + right, bottom_weight * right_weight, mask, IS_BACKWARD)
    return tile


@triton.jit
def _visit_row(
    tile, feature, x1, y1, bin_w, bin_h, x_bin, y_bin, x_grid, y_grid, width, height, columns, mask,
    C: tl.constexpr, GRID: tl.constexpr, IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    """All samples of a row of bins."""
    pitch = width.to(tl.int64) * C
    if GRID > 0:
        for y_step in tl.static_range(GRID):
            top, bottom, top_weight, bottom_weight = _axis_taps(y1, bin_h, y_bin, y_step, y_grid, height, GRID)
            for x_step in tl.static_range(GRID):
                tile = _visit_samples(
                    tile, feature + top * pitch, feature + bottom * pitch,
                    top_weight * (1.0 / (GRID * GRID)), bottom_weight * (1.0 / (GRID * GRID)),
                    x1, bin_w, x_bin, x_step, x_grid, width, columns, mask, C, GRID, IS_BACKWARD,
                )  # fmt: skip
    else:
        for y_step in range(y_grid.to(tl.int32)):
            top, bottom, top_weight, bottom_weight = _axis_taps(y1, bin_h, y_bin, y_step, y_grid, height, GRID)
            if top_weight + bottom_weight > 0.0:  # most rows of a box far larger than the map lie outside of it
                for x_step in range(x_grid.to(tl.int32)):
                    tile = _visit_samples(
                        tile, feature + top * pitch, feature + bottom * pitch, top_weight, bottom_weight,
                        x1, bin_w, x_bin, x_step, x_grid, width, columns, mask, C, GRID, IS_BACKWARD,
                    )  # fmt: skip
    return tile


@triton.jit(do_not_specialize=["N", "slots", "sampling_ratio"])
def roi_align_kernel(
    features, heights, widths, scales, smallest, rois, counts, pooled, N, slots, sampling_ratio,
    C: tl.constexpr, SIZE: tl.constexpr, GRID: tl.constexpr, MAX_GRID: tl.constexpr, IS_ALIGNED: tl.constexpr,
    HAS_COUNTS: tl.constexpr, IS_BACKWARD: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (R * ceil(SIZE / ROWS) * ceil(SIZE / BINS), ceil(C / BLOCK_C)): ROWS rows of BINS bins of a RoI.

    ``features``: each level's (N, H, W, C), or its float32 gradient. ``pooled``: (R, SIZE, SIZE, C), or its gradient.
    GRID: samples per bin and axis if they are 1 or 2; 0 leaves them to ``sampling_ratio``, and 0 there to the RoI.
    """
    roi, y_first, y_end, x_bin, columns, mask, offsets = place_tile(C, SIZE, ROWS, BINS, BLOCK_C)
    at = pooled + offsets

    present, image, x1, y1, x2, y2 = load_roi(rois, counts, roi, slots, N, HAS_COUNTS)
    if present:
        level = level_of(smallest, x1, y1, x2, y2)
        height, width = pick_size(heights, level), pick_size(widths, level)
        scale = pick_pointer(scales, level)
        feature = pick_pointer(features, level) + image.to(tl.int64) * height * width * C
        offset = 0.5 if IS_ALIGNED else 0.0
        x1 = tl.clamp(x1 * scale, -1e6, 1e6) - offset
        y1 = tl.clamp(y1 * scale, -1e6, 1e6) - offset
        x_side = tl.clamp(x2 * scale, -1e6, 1e6) - offset - x1
        y_side = tl.clamp(y2 * scale, -1e6, 1e6) - offset - y1
        if not IS_ALIGNED:
            x_side = tl.maximum(x_side, 1.0)
            y_side = tl.maximum(y_side, 1.0)
        bin_w = tl.div_rn(x_side, tl.full((), SIZE, tl.float32))
        bin_h = tl.div_rn(y_side, tl.full((), SIZE, tl.float32))
        x_grid = tl.full((), GRID if GRID > 0 else sampling_ratio, tl.float32)
        y_grid = x_grid
        if GRID == 0 and sampling_ratio == 0:
            x_grid = tl.minimum(tl.ceil(bin_w), MAX_GRID)
            y_grid = tl.minimum(tl.ceil(bin_h), MAX_GRID)
        share = 1.0  # of a sample in its bin, unless that is known
        if GRID == 0:
            share = tl.div_rn(tl.full((), 1.0, tl.float32), tl.maximum(x_grid * y_grid, 1.0))
        for y_bin in range(y_first, y_end):
            if IS_BACKWARD:
                tile = tl.load(at + y_bin * (SIZE * C), mask=mask).to(tl.float32) * share
            else:
                tile = tl.zeros([BINS, BLOCK_C], tl.float32)
            tile = _visit_row(
                tile, feature, x1, y1, bin_w, bin_h, x_bin, y_bin, x_grid, y_grid, width, height, columns, mask,
                C, GRID, IS_BACKWARD,
            )  # fmt: skip
            if not IS_BACKWARD:
                tl.store(at + y_bin * (SIZE * C), tile * share, mask=mask)
    elif not IS_BACKWARD:
        for y_bin in range(y_first, y_end):
            tl.store(at + y_bin * (SIZE * C), tl.zeros([BINS, BLOCK_C], tl.float32), mask=mask)


def launch_multilevel_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    counts: Tensor | None,
    output_size: int,
    strides: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> Tensor:
    """As :func:`fpn_kernels.multilevel_roi_align`, without a word to the host."""
    pooled = features[0].new_empty(len(rois), output_size, output_size, features[0].shape[1])
    levels = smallest_sizes(len(features), min_level, canonical_level, float(canonical_size))
    _launch(to_nhwc(features), rois, counts, pooled, strides, sampling_ratio, aligned, levels, is_backward=False)
    return pooled.permute(0, 3, 1, 2)


def launch_multilevel_roi_align_backward(
    gradient: Tensor,
    sizes: Sequence[int],
    rois: Tensor,
    counts: Tensor | None,
    strides: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> list[Tensor]:
    """Gradients of the levels, (N, C, H, W) in channels_last order, from that of the result, (R, C, S, S).

    ``sizes``: N, then H and W of each level. Sums are in float32, by atomic additions in any order.
    """
    pooled = gradient.permute(0, 2, 3, 1).contiguous()
    n, c = sizes[0], pooled.shape[3]
    tables = tuple(
        torch.zeros(n, h, w, c, dtype=torch.float32, device=gradient.device)
        for h, w in zip(sizes[1::2], sizes[2::2], strict=True)
    )
    levels = smallest_sizes(len(tables), min_level, canonical_level, float(canonical_size))
    _launch(tables, rois, counts, pooled, strides, sampling_ratio, aligned, levels, is_backward=True)
    return [table.to(gradient.dtype).permute(0, 3, 1, 2) for table in tables]


def _launch(
    tables: tuple[Tensor, ...],
    rois: Tensor,
    counts: Tensor | None,
    pooled: Tensor,
    strides: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    levels: tuple[float, ...],
    *,
    is_backward: bool,
) -> None:
    if pooled.numel() == 0:
        return
    size, channels = pooled.shape[2:]
    images = len(tables[0])
    tile = tile_for(size, channels)
    parts = triton.cdiv(size, tile["ROWS"]) * triton.cdiv(size, tile["BINS"])
    grid = len(rois) * parts, triton.cdiv(channels, tile["BLOCK_C"])
    roi_align_kernel[grid](
        tables, *pack_sides(tables), tuple(1.0 / stride for stride in strides), levels, rois.contiguous(),
        None if counts is None else counts.contiguous(), pooled, images, len(rois) // max(images, 1), sampling_ratio,
        C=channels, SIZE=size, GRID=sampling_ratio if sampling_ratio <= UNROLLED else 0, MAX_GRID=MAX_GRID,
        IS_ALIGNED=aligned, HAS_COUNTS=counts is not None, IS_BACKWARD=is_backward, **tile, enable_fp_fusion=False,
    )  # fmt: skip


def _build(
    variant: str, dtype: str, channels: int, size: int = 7, grid: int = 2, levels: int = 4, is_backward: bool = False
) -> Build:
    tile = tile_for(size, channels)
    return Build(
        kernel=roi_align_kernel,
        variant=variant,
        signature={
            "features": (f"*{'fp32' if is_backward else dtype}",) * levels,
            **dict.fromkeys(("heights", "widths"), ("i32",) * levels),
            **dict.fromkeys(("scales", "smallest"), ("fp32",) * levels),
            "rois": "*fp32", "counts": "*i64", "pooled": f"*{dtype}", "N": "i32", "slots": "i32",
            "sampling_ratio": "i32",
        },
        constants={
            "C": channels, "SIZE": size, "GRID": grid, "MAX_GRID": MAX_GRID, "IS_ALIGNED": False, "HAS_COUNTS": True,
            "IS_BACKWARD": is_backward, **{name: tile[name] for name in ("ROWS", "BINS", "BLOCK_C")},
        },
        num_warps=tile["num_warps"],
    )  # fmt: skip


BUILDS = (
    _build("fp16", "fp16", 256),
    _build("bf16", "bf16", 256),
    _build("fp32", "fp32", 256),
    _build("fp16 adaptive", "fp16", 256, grid=0),
    _build("fp16 1024", "fp16", 1024, size=14, levels=1),
    _build("fp16 backward", "fp16", 256, is_backward=True),
    _build("fp16 adaptive backward", "fp16", 256, grid=0, is_backward=True),
)
