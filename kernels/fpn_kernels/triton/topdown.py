"""Top-down merge in NHWC, one launch per level.

``merge_kernel`` where the lateral is there already: a program takes cells of the coarser level, each with its four
children, so that every byte is read or written once. ``lateral_kernel`` computes the 1x1 convolution too: rows of C_in
channels times the weight on tensor cores; bias and coarser row are added in float32, and the sum is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.topdown import memory_format_of
from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.tiles import FLOAT32_TILE, Tile

MERGE_BYTES = 4096  # of the coarser level per program: two 128-bit loads per thread, and eight of the lateral


# Largest first: a larger one reads less from L2, a smaller one fills more multiprocessors. 96 KB of shared memory at
# most, so that two programs fit where there are 227 KB and one where there are 99.
TILES = (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 4), Tile(64, 64, 128, 4, 3), Tile(64, 32, 64, 4, 8))
FILLED = 0.75  # of the multiprocessors; 120 large tiles on 132 of them beat 240 small ones


@triton.jit
def _load_child(lateral, first, x, y, dx, dy, inside, channels, H, W, C: tl.constexpr):
    """A child of each cell: where it lies, whether it is in the map, its values."""
    at = (first + dy * W + dx) * C + channels
    child = inside & (x + dx < W) & (y + dy < H)
    return at, child, tl.load(lateral + at, mask=child).to(tl.float32)


@triton.jit(do_not_specialize=["cells", "H", "W"])
def merge_kernel(
    lateral, coarse, out, cells, H, W, C: tl.constexpr, CELLS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Grid (ceil(cells / CELLS), ceil(C / BLOCK_C)); ``cells`` of the coarser level: N ceil(H / 2) ceil(W / 2)."""
    cell = tl.program_id(0).to(cells.dtype) * CELLS + tl.arange(0, CELLS)
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    coarse_w = (W + 1) // 2
    row = cell // coarse_w
    image = row // ((H + 1) // 2)
    x = ((cell - row * coarse_w) * 2)[:, None]
    y = ((row - image * ((H + 1) // 2)) * 2)[:, None]
    first = (image[:, None].to(tl.int64) * H + y) * W + x
    inside = (cell < cells)[:, None] & (channels < C)
    parent = tl.load(coarse + cell[:, None].to(tl.int64) * C + channels, mask=inside).to(tl.float32)
    # All loads before the first store: the compiler has to assume that they overlap.
    at00, inside00, child00 = _load_child(lateral, first, x, y, 0, 0, inside, channels, H, W, C)
    at01, inside01, child01 = _load_child(lateral, first, x, y, 1, 0, inside, channels, H, W, C)
    at10, inside10, child10 = _load_child(lateral, first, x, y, 0, 1, inside, channels, H, W, C)
    at11, inside11, child11 = _load_child(lateral, first, x, y, 1, 1, inside, channels, H, W, C)
    tl.store(out + at00, child00 + parent, mask=inside00)
    tl.store(out + at01, child01 + parent, mask=inside01)
    tl.store(out + at10, child10 + parent, mask=inside10)
    tl.store(out + at11, child11 + parent, mask=inside11)


def launch_topdown_merge(lateral: Tensor, coarse: Tensor) -> Tensor:
    """As :func:`fpn_kernels.topdown_merge`, in one launch."""
    n, c, h, w = lateral.shape
    memory_format = memory_format_of(lateral)
    if memory_format is torch.contiguous_format:
        n, c = n * c, 1  # planes are images of one channel
    lateral = lateral.contiguous(memory_format=memory_format)
    coarse = coarse.contiguous(memory_format=memory_format)
    out = torch.empty_like(lateral)
    if out.numel() == 0:
        return out
    cells = n * triton.cdiv(h, 2) * triton.cdiv(w, 2)
    tile = _merge_tile(c, lateral.element_size())
    merge_kernel[(triton.cdiv(cells, tile["CELLS"]), triton.cdiv(c, tile["BLOCK_C"]))](
        lateral, coarse, out, cells, h, w, C=c, **tile, num_warps=4, enable_fp_fusion=False
    )
    return out


def _merge_tile(channels: int, itemsize: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(channels), 512 // itemsize)
    return {"CELLS": min(MERGE_BYTES // itemsize // block, 512), "BLOCK_C": block}


@triton.jit(do_not_specialize=["M", "H", "W", "COARSE_H", "COARSE_W"])
def lateral_kernel(
    c, weight, bias, coarser, out, M, H, W, COARSE_H, COARSE_W, scale_h, scale_w,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_COARSER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(M / BLOCK_M) * ceil(C_OUT / BLOCK_N),), the columns of one row after another, for the cache's sake.

    ``c``: (M, C_IN), M = N H W. ``weight``: (C_OUT, C_IN). ``coarser``: (N COARSE_H COARSE_W, C_OUT).
    """
    n_blocks: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    rows = tl.program_id(0) // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < C_OUT)[None, :]
    rows = tl.minimum(rows, M - 1)  # nothing but the store needs a mask
    k = tl.arange(0, BLOCK_K)
    c_at = c + rows.to(tl.int64)[:, None] * C_IN + k[None, :]
    weight_at = weight + tl.minimum(columns, C_OUT - 1)[None, :] * C_IN + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C_IN, BLOCK_K):
        if C_IN % BLOCK_K == 0:
            a = tl.load(c_at + start)
            b = tl.load(weight_at + start)
        else:
            a = tl.load(c_at + start, mask=(k < C_IN - start)[None, :], other=0.0)
            b = tl.load(weight_at + start, mask=(k < C_IN - start)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < C_OUT).to(tl.float32)[None, :]
    if HAS_COARSER:
        row = rows // W
        image = row // H
        y = tl.minimum(((row - image * H).to(tl.float32) * scale_h).to(tl.int32), COARSE_H - 1)
        x = tl.minimum(((rows - row * W).to(tl.float32) * scale_w).to(tl.int32), COARSE_W - 1)
        parent = ((image * COARSE_H + y) * COARSE_W + x).to(tl.int64) * C_OUT
        total += tl.load(coarser + parent[:, None] + columns[None, :], mask=inside).to(tl.float32)
    tl.store(out + rows.to(tl.int64)[:, None] * C_OUT + columns[None, :], total, mask=inside)


def launch_lateral_merge(c: Tensor, weight: Tensor, bias: Tensor | None, coarser: Tensor | None) -> Tensor:
    """As :func:`fpn_kernels.lateral_merge`, in one launch."""
    n, c_in, h, w = c.shape
    c_out = len(weight)
    out = c.new_empty(n, h, w, c_out)
    if out.numel() == 0:
        return out.permute(0, 3, 1, 2)
    rows = c.permute(0, 2, 3, 1).contiguous()
    weight = weight.contiguous()
    if c.dtype == torch.bfloat16 and c.device.type == "cpu":  # Triton's interpreter would multiply the bits as integers
        rows, weight = rows.float(), weight.float()
    parents = None if coarser is None else coarser.permute(0, 2, 3, 1).contiguous()
    # F.interpolate takes the float32 of in / out, too.
    coarse_h, coarse_w = (h, w) if parents is None else parents.shape[1:3]
    tile = tile_for(n * h * w, c_in, c_out, c.dtype, _count_processors(c.device))
    grid = (triton.cdiv(n * h * w, tile.m) * triton.cdiv(c_out, tile.n),)
    lateral_kernel[grid](
        rows, weight, None if bias is None else bias.contiguous(), parents, out,
        n * h * w, h, w, coarse_h, coarse_w, coarse_h / h, coarse_w / w,
        C_IN=c_in, C_OUT=c_out, HAS_BIAS=bias is not None, HAS_COARSER=coarser is not None,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def tile_for(rows: int, c_in: int, c_out: int, dtype: torch.dtype, processors: int) -> Tile:
    """The largest tile with which the programs fill the multiprocessors, no wider than the convolution."""
    tile = FLOAT32_TILE
    if dtype != torch.float32:
        wanted = FILLED * processors
        enough = (t for t in TILES if triton.cdiv(rows, t.m) * triton.cdiv(c_out, t.n) >= wanted)
        tile = next(enough, TILES[-1])
    narrow = max(triton.next_power_of_2(c_out), 16)  # tl.dot takes no side below 16
    return tile._replace(n=min(tile.n, narrow), k=min(tile.k, max(triton.next_power_of_2(c_in), 16)))


def _count_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _build_merge(dtype: str, channels: int) -> Build:
    tile = _merge_tile(channels, 4 if dtype == "fp32" else 2)
    return Build(
        kernel=merge_kernel,
        variant=f"{dtype} C={channels}",
        signature={**dict.fromkeys(("lateral", "coarse", "out"), f"*{dtype}"), "cells": "i32", "H": "i32", "W": "i32"},
        constants={"C": channels, **tile},
    )


def _build_lateral(dtype: torch.dtype, rows: int, c_in: int, has_coarser: bool = True) -> Build:
    tile = tile_for(rows, c_in, 256, dtype, H200_PROCESSORS)
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    pointers = ("c", "weight", "bias", "coarser", "out") if has_coarser else ("c", "weight", "bias", "out")
    return Build(
        kernel=lateral_kernel,
        variant=f"{name} {rows}x{c_in}",
        signature={
            **dict.fromkeys(pointers, f"*{name}"),
            **dict.fromkeys(("M", "H", "W", "COARSE_H", "COARSE_W"), "i32"),
            **dict.fromkeys(("scale_h", "scale_w"), "fp32"),
        },
        constants={
            "C_IN": c_in, "C_OUT": 256, "HAS_BIAS": True, "HAS_COARSER": has_coarser,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, **({} if has_coarser else {"coarser": None}),
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


H200_PROCESSORS = 132
# Rows and channels of c2..c5 of an 800 x 1216 image, whose four tiles differ.
BUILDS = (
    *(_build_merge(*variant) for variant in (("fp16", 256), ("bf16", 256), ("fp32", 256), ("fp16", 1))),
    _build_lateral(torch.float16, 200 * 304, 256),
    _build_lateral(torch.float16, 100 * 152, 512),
    _build_lateral(torch.float16, 50 * 76, 1024),
    _build_lateral(torch.float16, 25 * 38, 2048, has_coarser=False),
    _build_lateral(torch.bfloat16, 200 * 304, 256),
    _build_lateral(torch.float32, 200 * 304, 256),
)
