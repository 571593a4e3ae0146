"""Convolution in NHWC as an implicit matrix product, with bias, residual and activation, for small maps in shares.

Rows are output cells, columns output channels; the depth is cut into blocks of one window cell's channels each (or of
the flattened window where channels are few). A tile of the result is computed whole by one program, or in shares:

- split-K: a fixed number of programs take equal parts of a tile's depth;
- stream-K (Osama et al. 2023, "Stream-K: Work-centric parallel decomposition for dense matrix-matrix multiplication on
  the GPU"): as many programs as there are multiprocessors take equal parts of all tiles' depths laid end to end.

Shares of a tile go to a workspace and are added in order of depth by a second launch, so that the same input gives the
same bits. All sums are float32, rounded once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.epilogue import CLIP, HARDSWISH, activate, find_parents
from fpn_kernels.triton.launching import launch
from fpn_kernels.triton.tiles import FLOAT32_TILE, RAGGED_TILES, STREAM, TILES, WHOLE, Tile, divide, fit_tile

REDUCED_ROWS = 8  # of a tile per program of the second launch
# How a row of the result finds its input.
DENSE, STRIDED, WINDOW, FLAT = 0, 1, 2, 3
FEW_CHANNELS = 32  # below which the window is flattened: less than a third of a block would be channels


@triton.jit
def _multiply(
    x, weight, rows, columns, first, last, C, H, W, OUT_H, OUT_W, KH, KW, top, left,
    stride_h, stride_w, dilation_h, dilation_w,
    MODE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Blocks ``first`` to ``last`` of the depth for one tile; rows and columns are inside."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    k = tl.arange(0, BLOCK_K)
    weight_at = weight + columns[None, :] * (KH * KW * C) + k[:, None]
    line = rows // OUT_W
    image = line // OUT_H
    y = (line - image * OUT_H) * stride_h - top
    x_first = (rows - line * OUT_W) * stride_w - left
    if MODE == 0:
        cells = rows.to(tl.int64)
    else:
        cells = (image.to(tl.int64) * H + y) * W + x_first
    x_at = x + cells[:, None] * C + k[None, :]
    c_blocks = tl.cdiv(C, BLOCK_K)
    for block in range(first, last):
        if MODE <= 1:
            start = block * BLOCK_K
            if EVEN:
                a = tl.load(x_at + start)
                b = tl.load(weight_at + start)
            else:
                a = tl.load(x_at + start, mask=(k < C - start)[None, :], other=0.0)
                b = tl.load(weight_at + start, mask=(k < C - start)[:, None], other=0.0)
        elif MODE == 2:
            tap = block // c_blocks
            start = (block - tap * c_blocks) * BLOCK_K
            dy = tap // KW * dilation_h
            dx = tap % KW * dilation_w
            there = (y + dy >= 0) & (y + dy < H) & (x_first + dx >= 0) & (x_first + dx < W)
            x_offset = (dy * W + dx) * C + start
            if EVEN:
                a = tl.load(x_at + x_offset, mask=there[:, None], other=0.0)
                b = tl.load(weight_at + (tap * C + start))
            else:
                rest = k < C - start
                a = tl.load(x_at + x_offset, mask=there[:, None] & rest[None, :], other=0.0)
                b = tl.load(weight_at + (tap * C + start), mask=rest[:, None], other=0.0)
        else:
            at = block * BLOCK_K + k
            tap = at // C
            in_y = y[:, None] + (tap // KW * dilation_h)[None, :]
            in_x = x_first[:, None] + (tap % KW * dilation_w)[None, :]
            there = (in_y >= 0) & (in_y < H) & (in_x >= 0) & (in_x < W) & (at < KH * KW * C)[None, :]
            cell = (image.to(tl.int64)[:, None] * H + in_y) * W + in_x
            a = tl.load(x + cell * C + (at - tap * C)[None, :], mask=there, other=0.0)
            b = tl.load(weight_at + block * BLOCK_K, mask=(at < KH * KW * C)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _finish(
    total, bias, residual, out, first, columns, M, N, OUT_W, low, high,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, UP_H: tl.constexpr, UP_W: tl.constexpr, FUNCTION: tl.constexpr,
):  # fmt: skip
    """What follows the product, and the store: rows from ``first`` on and columns as they are, some outside.

    Places are reckoned from the first row's, in 32 bits: 64 would take the registers that a second program needs.
    """
    local = tl.arange(0, total.shape[0])
    inside = (local < M - first)[:, None] & (columns < N)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < N).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        if UP_H * UP_W == 1:
            begin = first.to(tl.int64) * N
            parents = local
        else:
            line = first // OUT_W // UP_H * UP_H
            begin = (line // UP_H).to(tl.int64) * (OUT_W // UP_W) * N
            parents = find_parents(first + local - line * OUT_W, OUT_W, UP_H, UP_W)
        total += tl.load(residual + begin + (parents[:, None] * N + columns[None, :]), mask=inside).to(tl.float32)
    at = local[:, None] * N + columns[None, :]
    tl.store(out + first.to(tl.int64) * N + at, activate(total, low, high, FUNCTION), mask=inside)


SIZES = ("M", "H", "W", "OUT_H", "OUT_W", "KH", "KW", "top", "left", "stride_h", "stride_w", "dilation_h", "dilation_w")


@triton.jit(do_not_specialize=[*SIZES, "per", "span", "steps"])
def convolution_kernel(
    x, weight, bias, residual, out, shares, M, N, C, H, W, OUT_H, OUT_W, KH, KW, top, left,
    stride_h, stride_w, dilation_h, dilation_w, low, high, per, span, steps,
    MODE: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, UP_H: tl.constexpr,
    UP_W: tl.constexpr, FUNCTION: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile, the columns of one row of tiles after another; SHARED: ceil(steps / per).

    ``x``: (images, H, W, C). ``weight``: (N, KH, KW, C). ``out``: (M, N), M = images OUT_H OUT_W.
    ``shares``: (2 x programs, BLOCK_M, BLOCK_N); a program's first share is in its own place, its last in the second
    half. Steps are blocks of the depth, ``span`` for every tile, ``per`` for every program.
    """
    n_tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    local_rows = tl.arange(0, BLOCK_M)
    local_columns = tl.arange(0, BLOCK_N)
    if MODE == 3:
        blocks = tl.cdiv(KH * KW * C, BLOCK_K)
    else:
        blocks = KH * KW * tl.cdiv(C, BLOCK_K)
    if SHARED:
        step = pid * per
        end = tl.minimum(step + per, steps)
        while step < end:
            tile = step // span
            first = step - tile * span
            last = tl.minimum(first + end - step, span)
            row = tile // n_tiles * BLOCK_M
            columns = tile % n_tiles * BLOCK_N + local_columns
            total = _multiply(
                x, weight, tl.minimum(row + local_rows, M - 1), tl.minimum(columns, N - 1),
                first, tl.minimum(last, blocks), C, H, W, OUT_H, OUT_W, KH, KW, top, left,
                stride_h, stride_w, dilation_h, dilation_w, MODE, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if last - first == span:
                _finish(
                    total, bias, residual, out, row, columns, M, N, OUT_W, low, high,
                    HAS_BIAS, HAS_RESIDUAL, UP_H, UP_W, FUNCTION,
                )  # fmt: skip
            else:
                slot = tl.where(step == pid * per, pid, tl.num_programs(0) + pid).to(tl.int64)
                at = slot * (BLOCK_M * BLOCK_N) + local_rows[:, None] * BLOCK_N + local_columns[None, :]
                tl.store(shares + at, total)
            step += last - first
    else:
        row = pid // n_tiles * BLOCK_M
        columns = pid % n_tiles * BLOCK_N + local_columns
        total = _multiply(
            x, weight, tl.minimum(row + local_rows, M - 1), tl.minimum(columns, N - 1), 0, blocks,
            C, H, W, OUT_H, OUT_W, KH, KW, top, left, stride_h, stride_w, dilation_h, dilation_w,
            MODE, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _finish(
            total, bias, residual, out, row, columns, M, N, OUT_W, low, high,
            HAS_BIAS, HAS_RESIDUAL, UP_H, UP_W, FUNCTION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "OUT_W", "per", "span", "programs"])
def reduce_kernel(
    shares, bias, residual, out, M, N, OUT_W, low, high, per, span, programs,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, UP_H: tl.constexpr, UP_W: tl.constexpr, FUNCTION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, BLOCK_M / ROWS): adds the shares of a tile in the order of its depth."""
    n_tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    start = tile * span
    first = start // per
    last = (start + span - 1) // per
    if first != last:  # else one program had all of it
        local_row = tl.program_id(1) * ROWS
        local_columns = tl.arange(0, BLOCK_N)
        at = (local_row + tl.arange(0, ROWS))[:, None] * BLOCK_N + local_columns[None, :]
        total = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for program in range(first, last + 1):
            slot = tl.where(program * per >= start, program, programs + program).to(tl.int64)
            total += tl.load(shares + slot * (BLOCK_M * BLOCK_N) + at)
        row = tile // n_tiles * BLOCK_M + local_row
        columns = tile % n_tiles * BLOCK_N + local_columns
        _finish(
            total, bias, residual, out, row, columns, M, N, OUT_W, low, high,
            HAS_BIAS, HAS_RESIDUAL, UP_H, UP_W, FUNCTION,
        )  # fmt: skip


def launch_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    tile: Tile,
    split: int = WHOLE,
    processors: int = 1,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    upsample: tuple[int, int] = (1, 1),
    function: int = CLIP,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Tensor:
    """out = activation(conv(x) + bias + upsampled residual), in one launch, or two where tiles are shared.

    Args:
        x: (N, H, W, C), or rows (R, C) of a fully connected layer; dense. weight: (O, KH, KW, C) or (O, C), dense, of
            the same number type. bias: (O,).
        residual: (N, OUT_H / up, OUT_W / up, O) or as ``out``, dense.
        out: (N, OUT_H, OUT_W, O) or (R, O), dense, of any number type; its size says where windows end. It may be a
            residual that is not upsampled.
        tile, split, processors: see :class:`Tile` and :func:`divide`. padding: at the top and at the left.
        function, bounds: of :data:`fpn_kernels.triton.epilogue.FUNCTIONS` and ``clip_bounds``.
    """
    if out.numel() == 0:
        return out
    c, n = x.shape[-1], len(weight)
    m = out.numel() // n
    h, w = x.shape[1:3] if x.ndim == 4 else (1, 1)
    out_h, out_w = out.shape[1:3] if out.ndim == 4 else (1, 1)
    kernel = tuple(weight.shape[1:3]) if weight.ndim == 4 else (1, 1)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":  # Triton's interpreter would multiply the bits as integers
        x, weight = x.float(), weight.float()
    mode = mode_for(kernel, stride, padding, (h, w), (out_h, out_w), c)
    tile = fit_tile(tile, n, c * math.prod(kernel) if mode == FLAT else c)
    tiles = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    blocks = count_blocks(tile, kernel, c, mode)
    shares = divide(tiles, blocks, split, processors)
    shared = split != WHOLE and shares.per < blocks
    workspace = None
    if shared:
        slots = shares.programs * (2 if split == STREAM else 1)
        workspace = torch.empty(slots * tile.m * tile.n, dtype=torch.float32, device=x.device)
    up_h, up_w = upsample if residual is not None else (1, 1)
    flags = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "UP_H": up_h, "UP_W": up_w}
    flags |= {"FUNCTION": function}
    launch(
        convolution_kernel, (shares.programs if shared else tiles,),
        x, weight, bias, residual, out, workspace, m, n, c, h, w, out_h, out_w, *kernel, *padding,
        *stride, *dilation, *bounds, shares.per, shares.span, shares.steps,
        MODE=mode, EVEN=c % tile.k == 0, **flags, SHARED=shared, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=min(tile.stages, blocks + 1), enable_fp_fusion=False,
    )  # fmt: skip
    if shared:
        launch(
            reduce_kernel, (tiles, triton.cdiv(tile.m, REDUCED_ROWS)),
            workspace, bias, residual, out, m, n, out_w, *bounds,
            shares.per, shares.span, shares.programs,
            **flags, BLOCK_M=tile.m, BLOCK_N=tile.n, ROWS=REDUCED_ROWS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def mode_for(
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int],
    out_size: tuple[int, int],
    channels: int,
) -> int:
    """How a row finds its input: itself, a row further on, through a window, or through a flattened window."""
    if kernel == (1, 1) and padding == (0, 0):
        inside = all((o - 1) * s < i for o, s, i in zip(out_size, stride, size, strict=True))
        if inside:
            return DENSE if size == out_size else STRIDED
    return FLAT if channels < FEW_CHANNELS else WINDOW


def count_blocks(tile: Tile, kernel: tuple[int, ...], channels: int, mode: int) -> int:
    """Blocks of the depth."""
    if mode == FLAT:
        return triton.cdiv(math.prod(kernel) * channels, tile.k)
    return math.prod(kernel) * triton.cdiv(channels, tile.k)


def _name(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _build(
    dtype: torch.dtype,
    tile: Tile,
    mode: int,
    *,
    shared: bool = False,
    residual: bool = False,
    up: int = 1,
    function: int = CLIP,
    out: torch.dtype | None = None,
    even: bool = True,
) -> Build:
    absent = {} if residual else {"residual": None}
    absent |= {} if shared else {"shares": None}
    types = {name: f"*{_name(dtype)}" for name in ("x", "weight", "bias", "residual", "out", "shares")}
    types |= {"out": f"*{_name(out or dtype)}", "shares": "*fp32"}
    integers = ("M", "N", "C", *SIZES[1:], "per", "span", "steps")
    kind = ("dense", "strided", "window", "flat")[mode] + (" lateral" if up > 1 else " residual") * residual
    kind += " shared" * shared
    kind += " hardswish" * (function == HARDSWISH) + (f" to {_name(out)}" if out else "") + " ragged" * (not even)
    return Build(
        kernel=convolution_kernel,
        variant=f"{_name(dtype)} {'x'.join(map(str, tile))} {kind}",
        signature={name: kind for name, kind in types.items() if name not in absent}
        | dict.fromkeys(integers, "i32")
        | dict.fromkeys(("low", "high"), "fp32"),
        constants={
            "MODE": mode, "EVEN": even, "HAS_BIAS": True, "HAS_RESIDUAL": residual,
            "UP_H": up, "UP_W": up, "FUNCTION": function,
            "SHARED": shared, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, **absent,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        divisible=("N", "C") if even else (),
    )  # fmt: skip


def _build_reduce(dtype: torch.dtype, tile: Tile, residual: bool) -> Build:
    absent = {} if residual else {"residual": None}
    types = {"shares": "*fp32"} | dict.fromkeys(("bias", "residual", "out"), f"*{_name(dtype)}")
    integers = ("M", "N", "OUT_W", "per", "span", "programs")
    return Build(
        kernel=reduce_kernel,
        variant=f"{_name(dtype)} {tile.m}x{tile.n}{' residual' * residual}",
        signature={name: kind for name, kind in types.items() if name not in absent}
        | dict.fromkeys(integers, "i32")
        | dict.fromkeys(("low", "high"), "fp32"),
        constants={
            "HAS_BIAS": True, "HAS_RESIDUAL": residual, "UP_H": 1, "UP_W": 1, "FUNCTION": CLIP,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "ROWS": REDUCED_ROWS, **absent,
        },
        divisible=("N",),
    )  # fmt: skip


_HALF = torch.float16
BUILDS = (
    *(_build(_HALF, tile, DENSE, residual=True) for tile in TILES),
    *(_build(_HALF, tile, DENSE, residual=True, up=2) for tile in TILES),
    *(_build(_HALF, tile._replace(stages=2), DENSE, residual=True) for tile in TILES),  # one block deep
    *(_build(_HALF, tile, WINDOW) for tile in TILES),
    *(_build(_HALF, tile, mode, shared=True) for tile in TILES[:4] for mode in (DENSE, WINDOW)),
    _build(_HALF, TILES[0], STRIDED),
    *(_build(_HALF, tile, FLAT, even=False) for tile in RAGGED_TILES),  # the stem
    _build(_HALF, Tile(64, 16, 64, 4, 8), DENSE, out=torch.float32),  # the RPN's heads
    *(_build(_HALF, tile, WINDOW, function=HARDSWISH, even=False) for tile in RAGGED_TILES),
    _build(_HALF, RAGGED_TILES[0], DENSE, even=False, shared=True),
    _build(torch.bfloat16, TILES[0], DENSE, residual=True),
    _build(torch.bfloat16, TILES[0], WINDOW),
    _build(torch.float32, FLOAT32_TILE, DENSE, residual=True),
    _build(torch.float32, FLOAT32_TILE, WINDOW),
    _build_reduce(_HALF, TILES[0], residual=True),
    _build_reduce(_HALF, TILES[2], residual=False),
    _build_reduce(torch.float32, FLOAT32_TILE, residual=True),
)
