"""RoIPool of all levels in one launch: a program pools rows of bins of one RoI, all channels at a time.

The corners and bins are rounded as the reference rounds them, in float32 without fused multiply-adds. The gradient runs
through the same kernel: it finds each maximum again, the first of equal ones, and adds to its cell atomically, in
float32 and in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.levels import pick_pointer, pick_size
from fpn_kernels.triton.rois import level_of, load_roi, pack_sides, place_tile, smallest_sizes, tile_for, to_nhwc

UNROLLED = 2  # cells of a bin that are in flight together


@triton.jit
def _round_half_away(x):
    whole = tl.where(x < 0.0, tl.ceil(x), tl.floor(x))
    return whole + tl.where(tl.abs(x - whole) >= 0.5, tl.where(x < 0.0, -1.0, 1.0), 0.0)


@triton.jit
def _bin_edges(bins, first, last, length, SIZE: tl.constexpr):
    """First cell of each bin, and the one behind its last, cut to the map."""
    bin_size = tl.div_rn(tl.maximum(last - first + 1.0, 1.0), tl.full((), SIZE, tl.float32))
    begin = tl.floor(bins * bin_size) + first
    end = tl.ceil((bins + 1) * bin_size) + first
    begin = tl.minimum(tl.maximum(begin, 0.0), length)
    end = tl.minimum(tl.maximum(end, 0.0), length)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _pool_row(
    feature, width, y_begin, y_end, x_begin, x_end, widest, columns, mask,
    C: tl.constexpr, STEP: tl.constexpr, IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    """The maxima of a row of bins and, backward only, which of the map's cells they are."""
    best = tl.full(mask.shape, float("-inf"), tl.float32)
    where = tl.broadcast_to((y_begin * width + x_begin)[:, None], mask.shape)
    row = feature + y_begin.to(tl.int64) * width * C
    for y in range(y_begin, y_end):
        for start in range(0, widest, STEP):
            for step in tl.static_range(STEP):
                x = x_begin + start + step
                inside = mask & (x < x_end)[:, None]
                value = tl.load(row + x[:, None] * C + columns, mask=inside, other=float("-inf")).to(tl.float32)
                if IS_BACKWARD:
                    where = tl.where(value > best, (y * width + x)[:, None], where)
                best = tl.maximum(best, value)
        row += width * C
    return best, where


@triton.jit(do_not_specialize=["N", "slots"])
def roi_pool_kernel(
    features, heights, widths, scales, smallest, rois, counts, pooled, gradients, N, slots,
    C: tl.constexpr, SIZE: tl.constexpr, HAS_COUNTS: tl.constexpr, IS_BACKWARD: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, BINS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (R * ceil(SIZE / ROWS) * ceil(SIZE / BINS), ceil(C / BLOCK_C)): ROWS rows of BINS bins of a RoI.

    ``features``: each level's (N, H, W, C); ``gradients``: backward only, the same in float32. ``pooled``:
    (R, SIZE, SIZE, C), or its gradient.
    """
    roi, y_first, y_last, x_bin, columns, mask, offsets = place_tile(C, SIZE, ROWS, BINS, BLOCK_C)
    at = pooled + offsets

    present, image, x1, y1, x2, y2 = load_roi(rois, counts, roi, slots, N, HAS_COUNTS)
    if present:
        level = level_of(smallest, x1, y1, x2, y2)
        height, width = pick_size(heights, level), pick_size(widths, level)
        scale = pick_pointer(scales, level)
        first = image.to(tl.int64) * height * width * C
        x1 = _round_half_away(tl.clamp(x1 * scale, -1e6, 1e6))
        y1 = _round_half_away(tl.clamp(y1 * scale, -1e6, 1e6))
        x2 = _round_half_away(tl.clamp(x2 * scale, -1e6, 1e6))
        y2 = _round_half_away(tl.clamp(y2 * scale, -1e6, 1e6))
        x_begin, x_end = _bin_edges(x_bin, x1, x2, width.to(tl.float32), SIZE)
        widest = tl.max(tl.where(x_bin < SIZE, x_end - x_begin, 0), axis=0)
        for y_bin in range(y_first, y_last):
            y_begin, y_end = _bin_edges(y_bin, y1, y2, height.to(tl.float32), SIZE)
            best, where = _pool_row(
                pick_pointer(features, level) + first, width, y_begin, y_end, x_begin, x_end, widest, columns, mask,
                C, STEP, IS_BACKWARD,
            )  # fmt: skip
            filled = x_begin < tl.where(y_begin < y_end, x_end, 0)
            if IS_BACKWARD:
                pulled = tl.load(at + y_bin * (SIZE * C), mask=mask).to(tl.float32)
                cells = pick_pointer(gradients, level) + first + where.to(tl.int64) * C + columns
                tl.atomic_add(cells, pulled, mask=mask & filled[:, None], sem="relaxed")
            else:
                tl.store(at + y_bin * (SIZE * C), tl.where(filled[:, None], best, 0.0), mask=mask)
    elif not IS_BACKWARD:
        for y_bin in range(y_first, y_last):
            tl.store(at + y_bin * (SIZE * C), tl.zeros([BINS, BLOCK_C], tl.float32), mask=mask)


def launch_multilevel_roi_pool(
    features: Sequence[Tensor],
    rois: Tensor,
    counts: Tensor | None,
    output_size: int,
    strides: Sequence[float],
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> Tensor:
    """As :func:`fpn_kernels.multilevel_roi_pool`, without a word to the host."""
    pooled = features[0].new_empty(len(rois), output_size, output_size, features[0].shape[1])
    levels = smallest_sizes(len(features), min_level, canonical_level, float(canonical_size))
    _launch(to_nhwc(features), None, rois, counts, pooled, strides, levels)
    return pooled.permute(0, 3, 1, 2)


def launch_multilevel_roi_pool_backward(
    gradient: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    counts: Tensor | None,
    strides: Sequence[float],
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> list[Tensor]:
    """Gradients of the levels, (N, C, H, W) in channels_last order, from that of the result, (R, C, S, S)."""
    tables = to_nhwc(features)
    gradients = tuple(torch.zeros_like(table, dtype=torch.float32) for table in tables)
    levels = smallest_sizes(len(features), min_level, canonical_level, float(canonical_size))
    _launch(tables, gradients, rois, counts, gradient.permute(0, 2, 3, 1).contiguous(), strides, levels)
    return [table.to(gradient.dtype).permute(0, 3, 1, 2) for table in gradients]


def _launch(
    tables: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...] | None,
    rois: Tensor,
    counts: Tensor | None,
    pooled: Tensor,
    strides: Sequence[float],
    levels: tuple[float, ...],
) -> None:
    if pooled.numel() == 0:
        return
    size, channels = pooled.shape[2:]
    images = len(tables[0])
    tile = tile_for(size, channels)
    parts = triton.cdiv(size, tile["ROWS"]) * triton.cdiv(size, tile["BINS"])
    roi_pool_kernel[(len(rois) * parts, triton.cdiv(channels, tile["BLOCK_C"]))](
        tables, *pack_sides(tables), tuple(1.0 / stride for stride in strides), levels, rois.contiguous(),
        None if counts is None else counts.contiguous(), pooled, gradients, images, len(rois) // max(images, 1),
        C=channels, SIZE=size, HAS_COUNTS=counts is not None, IS_BACKWARD=gradients is not None, STEP=UNROLLED,
        **tile, enable_fp_fusion=False,
    )  # fmt: skip


def _build(variant: str, dtype: str, levels: int = 4, is_backward: bool = False) -> Build:
    tile = tile_for(7, 256)
    return Build(
        kernel=roi_pool_kernel,
        variant=variant,
        signature={
            "features": (f"*{dtype}",) * levels,
            **dict.fromkeys(("heights", "widths"), ("i32",) * levels),
            **dict.fromkeys(("scales", "smallest"), ("fp32",) * levels),
            "rois": "*fp32", "counts": "*i64", "pooled": f"*{dtype}", "N": "i32", "slots": "i32",
            **({"gradients": ("*fp32",) * levels} if is_backward else {}),
        },
        constants={
            "C": 256, "SIZE": 7, "HAS_COUNTS": True, "IS_BACKWARD": is_backward, "STEP": UNROLLED,
            **{name: tile[name] for name in ("ROWS", "BINS", "BLOCK_C")},
            **({} if is_backward else {"gradients": None}),
        },
        num_warps=tile["num_warps"],
    )  # fmt: skip


BUILDS = (
    _build("fp16", "fp16"),
    _build("bf16", "bf16"),
    _build("fp32", "fp32"),
    _build("fp16 backward", "fp16", is_backward=True),
)
