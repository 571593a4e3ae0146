"""Windows of chosen locations: a gather of all levels in one launch, and an implicit matrix product on them.

``window_linear_kernel`` is a convolution whose rows are the chosen places in place of all cells: a block of the depth
is one window cell's channels, read from wherever each row's place is. The windows, 3200 or 6272 numbers a place, are
never written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.levels import pick_pointer, pick_size
from fpn_kernels.triton.rois import pack_sides, to_nhwc
from fpn_kernels.triton.tiles import Tile, fit_tile

CELLS = 16  # of a window per program of the gather
NOWHERE = tl.constexpr(1 << 30)  # a row or column that no level has, and that fits 32 bits with a window around it
FLOAT32_TILE = Tile(32, 64, 32, 4, 3)  # no tensor cores; each row's place takes registers too
HALF_TILE = Tile(64, 64, 64, 4, 4)  # 1000 places and 512 columns make 128 programs, for 132 multiprocessors


@triton.jit
def _load_place(places, rows, N, LEVELS: tl.constexpr):
    """Image, level, y and x of places, and whether there is such an image and level; what is no cell stays none."""
    image = tl.load(places + rows * 4)
    level = tl.load(places + rows * 4 + 1)
    y = tl.minimum(tl.maximum(tl.load(places + rows * 4 + 2), -NOWHERE), NOWHERE)
    x = tl.minimum(tl.maximum(tl.load(places + rows * 4 + 3), -NOWHERE), NOWHERE)
    there = (image >= 0) & (image < N) & (level >= 0) & (level < LEVELS)
    return tl.where(there, image, 0), tl.where(there, level, 0).to(tl.int32), y.to(tl.int32), x.to(tl.int32), there


@triton.jit(do_not_specialize=["N"])
def gather_windows_kernel(
    features, heights, widths, places, windows, N,
    C: tl.constexpr, KERNEL: tl.constexpr, IS_BACKWARD: tl.constexpr, CELLS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (R * ceil(KERNEL^2 / CELLS), ceil(C / BLOCK_C)): CELLS cells of a window.

    ``features``: each level's (N, H, W, C), or its float32 gradient. ``windows``: (R, KERNEL^2, C), or its gradient.
    """
    parts: tl.constexpr = (KERNEL * KERNEL + CELLS - 1) // CELLS
    row = (tl.program_id(0) // parts).to(tl.int64)
    cells = tl.program_id(0) % parts * CELLS + tl.arange(0, CELLS)
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (cells < KERNEL * KERNEL)[:, None] & (channels < C)
    at = windows + (row * (KERNEL * KERNEL) + cells)[:, None] * C + channels
    image, level, y, x, there = _load_place(places, row, N, len(features))
    if there:
        height, width = pick_size(heights, level), pick_size(widths, level)
        rows = y + cells // KERNEL - KERNEL // 2
        columns = x + cells % KERNEL - KERNEL // 2
        inside = mask & ((rows >= 0) & (rows < height) & (columns >= 0) & (columns < width))[:, None]
        source = pick_pointer(features, level) + ((image * height + rows) * width + columns)[:, None] * C + channels
        if IS_BACKWARD:
            tl.atomic_add(source, tl.load(at, mask=mask).to(tl.float32), mask=inside, sem="relaxed")
        else:
            tl.store(at, tl.load(source, mask=inside, other=0.0), mask=mask)
    elif not IS_BACKWARD:
        tl.store(at, tl.zeros([CELLS, BLOCK_C], tl.float32), mask=mask)


@triton.jit(do_not_specialize=["R", "N"])
def window_linear_kernel(
    features, heights, widths, places, weight, bias, out, R, N,
    C: tl.constexpr, C_OUT: tl.constexpr, KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr, IS_RELU: tl.constexpr,
    IS_ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(R / BLOCK_M) * ceil(C_OUT / BLOCK_N),), the columns of one row of tiles after another.

    ``weight``: (C_OUT, KERNEL^2 C). ``out``: (R, C_OUT).
    """
    n_blocks: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    c_blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    rows = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    image, level, y, x, there = _load_place(places, tl.minimum(rows, R - 1), N, len(features))
    height, width = pick_size(heights, level), pick_size(widths, level)
    k = tl.arange(0, BLOCK_K)
    y -= KERNEL // 2
    x -= KERNEL // 2
    first = pick_pointer(features, level) + ((image * height + y) * width + x) * C
    if IS_ALIGNED:  # a choice among pointers is not known to keep it
        first = tl.multiple_of(first, 16)
    weight_at = weight + tl.minimum(columns, C_OUT - 1)[None, :] * (KERNEL * KERNEL * C) + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(0, KERNEL * KERNEL * c_blocks):
        cell = block // c_blocks
        start = (block - cell * c_blocks) * BLOCK_K
        dy = cell // KERNEL
        dx = cell - dy * KERNEL
        inside = there & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        a_at = (first + (dy * width + dx) * C)[:, None] + start + k[None, :]
        b_at = weight_at + cell * C + start
        if C % BLOCK_K == 0:
            a = tl.load(a_at, mask=inside[:, None], other=0.0)
            b = tl.load(b_at)
        else:
            rest = k < C - start
            a = tl.load(a_at, mask=inside[:, None] & rest[None, :], other=0.0)
            b = tl.load(b_at, mask=rest[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < C_OUT, other=0.0).to(tl.float32)[None, :]
    if IS_RELU:
        total = tl.maximum(total, 0.0, tl.PropagateNan.ALL)
    mask = (rows < R)[:, None] & (columns < C_OUT)[None, :]
    tl.store(out + rows[:, None] * C_OUT + columns[None, :], total, mask=mask)


def launch_gather_windows(features: Sequence[Tensor], places: Tensor, kernel: int) -> Tensor:
    """As :func:`fpn_kernels.gather_windows`, in one launch."""
    windows = features[0].new_empty(len(places), kernel, kernel, features[0].shape[1])
    _launch_gather(to_nhwc(features), places, windows, is_backward=False)
    return windows


def launch_gather_windows_backward(gradient: Tensor, sizes: Sequence[int], places: Tensor) -> list[Tensor]:
    """Gradients of the levels, (N, C, H, W) in channels_last order, from that of the windows.

    ``sizes``: N, then H and W of each level. Sums are in float32, by atomic additions in any order.
    """
    n, c = sizes[0], gradient.shape[3]
    tables = tuple(
        torch.zeros(n, h, w, c, dtype=torch.float32, device=gradient.device)
        for h, w in zip(sizes[1::2], sizes[2::2], strict=True)
    )
    _launch_gather(tables, places, gradient.contiguous(), is_backward=True)
    return [table.to(gradient.dtype).permute(0, 3, 1, 2) for table in tables]


def _launch_gather(tables: tuple[Tensor, ...], places: Tensor, windows: Tensor, *, is_backward: bool) -> None:
    if windows.numel() == 0:
        return
    kernel, channels = windows.shape[2:]
    block = block_for(channels)
    grid = (len(places) * triton.cdiv(kernel**2, CELLS), triton.cdiv(channels, block))
    gather_windows_kernel[grid](
        tables, *pack_sides(tables), places.contiguous(), windows, len(tables[0]),
        C=channels, KERNEL=kernel, IS_BACKWARD=is_backward, CELLS=CELLS, BLOCK_C=block, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


def launch_window_linear(
    features: Sequence[Tensor], places: Tensor, weight: Tensor, bias: Tensor | None, kernel: int, relu: bool
) -> Tensor:
    """As :func:`fpn_kernels.window_linear`, in one launch."""
    channels, columns = features[0].shape[1], len(weight)
    out = features[0].new_empty(len(places), columns)
    if out.numel() == 0:
        return out
    tables, weight = to_nhwc(features), weight.contiguous()
    if out.dtype == torch.bfloat16 and out.device.type == "cpu":  # Triton's interpreter would multiply the bits
        tables, weight = tuple(table.float() for table in tables), weight.float()
    tile = linear_tile(weight.dtype, columns, channels)
    window_linear_kernel[(triton.cdiv(len(places), tile.m) * triton.cdiv(columns, tile.n),)](
        tables, *pack_sides(tables), places.contiguous(), weight, None if bias is None else bias.contiguous(), out,
        len(places), len(tables[0]), C=channels, C_OUT=columns, KERNEL=kernel, HAS_BIAS=bias is not None, IS_RELU=relu,
        IS_ALIGNED=all((table.data_ptr() | channels * table.element_size()) % 16 == 0 for table in tables),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def block_for(channels: int) -> int:
    """Channels of a program of the gather."""
    return min(triton.next_power_of_2(channels), 256)


def linear_tile(dtype: torch.dtype, columns: int, channels: int) -> Tile:
    """The tile of the product; one size, since the rows are always about 1000."""
    return fit_tile(FLOAT32_TILE if dtype == torch.float32 else HALF_TILE, columns, channels)


def _build_gather(dtype: str, channels: int, levels: int = 5, is_backward: bool = False) -> Build:
    return Build(
        kernel=gather_windows_kernel,
        variant=f"{dtype} {channels}{' backward' * is_backward}",
        signature={
            "features": (f"*{'fp32' if is_backward else dtype}",) * levels,
            **dict.fromkeys(("heights", "widths"), ("i32",) * levels),
            "places": "*i64", "windows": f"*{dtype}", "N": "i32",
        },
        constants={
            "C": channels, "KERNEL": 5, "IS_BACKWARD": is_backward, "CELLS": CELLS, "BLOCK_C": block_for(channels),
        },
    )  # fmt: skip


def _build_linear(dtype: torch.dtype, channels: int, kernel: int, levels: int = 5) -> Build:
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    tile = linear_tile(dtype, 512, channels)
    return Build(
        kernel=window_linear_kernel,
        variant=f"{name} {kernel}x{kernel}x{channels}",
        signature={
            "features": (f"*{name}",) * levels,
            **dict.fromkeys(("heights", "widths"), ("i32",) * levels),
            "places": "*i64", **dict.fromkeys(("weight", "bias", "out"), f"*{name}"), "R": "i32", "N": "i32",
        },
        constants={
            "C": channels, "C_OUT": 512, "KERNEL": kernel, "HAS_BIAS": True, "IS_RELU": True, "IS_ALIGNED": True,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


BUILDS = (
    _build_gather("fp16", 128),
    _build_gather("fp32", 128),
    _build_gather("fp16", 128, is_backward=True),
    _build_linear(torch.float16, 128, 5),
    _build_linear(torch.float16, 128, 7),
    _build_linear(torch.bfloat16, 128, 5),
    _build_linear(torch.float32, 128, 5),
)
