"""Convolution of few channels in NHWC, as the first of a network has, with bias and activation.

The numbers that one row of a window needs lie in one piece, kW C of them, and the pieces of neighbouring output cells
overlap. They are read in units of two halves, aligned, as a register of a tensor core's operand holds them; a window
that does not begin on a unit has a number in front that is cleared. The units of all rows make the depth without gaps:
7 x 7 x 3 takes 160 instead of the 7 x 32 that whole rows would. Where rows of the map or the steps of the windows have
an odd number of halves, and in float32, a unit is one number.

A program computes cells of one output row. Its loads are issued before the first product, without masks where no window
meets a border. Sums are float32, rounded once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.epilogue import CLIP, HARDSWISH, activate
from fpn_kernels.triton.launching import launch
from fpn_kernels.triton.tiles import FEW_CHANNELS_TILES, Tile

MOST_CHANNELS = 4
MOST_UNITS = 160  # of a window: registers for all loads at once


class Units(NamedTuple):
    """How a convolution reads its input.

    Attributes:
        per: numbers of a unit. lead: numbers in front of a window that are read and cleared. wide: units of a row of a
            window. step: units from a window to the next. first: the unit where the first window of a row begins,
            negative in the padding.
    """

    per: int
    lead: int
    wide: int
    step: int
    first: int

    def split(self) -> Units:
        """The same with units of one number."""
        return Units(1, self.lead, self.wide * self.per, self.step * self.per, self.first * self.per)


def count_units(kernel: tuple[int, ...], channels: int, width: int, stride: int, left: int, itemsize: int) -> Units:
    """The units of windows ``stride`` cells apart on rows of ``width`` cells, the first ``left`` cells outside."""
    numbers = kernel[1] * channels
    per = 2 if itemsize == 2 and width * channels % 2 == 0 and stride * channels % 2 == 0 else 1
    lead = -left * channels % per
    return Units(per, lead, -(-(lead + numbers) // per), stride * channels // per, (-left * channels - lead) // per)


def few_channels_tiles(units: Units) -> tuple[Tile, ...]:
    """The tiles that have registers for as many loads."""
    return tuple(tile for tile in FEW_CHANNELS_TILES if units.per == 2 or tile.m <= 16 * tile.warps)


def pack_weight(weight: Tensor, units: Units, depth: int) -> Tensor:
    """(O, KH, KW, C) as the kernel reads it: (O, D), zeros where a unit has nothing of the window, O and D filled up.

    ``depth``: what D is to be a multiple of; O becomes one of 64.
    """
    rows = weight.flatten(2)
    rows = F.pad(rows, (units.lead, units.wide * units.per - units.lead - rows.shape[-1])).flatten(1)
    return F.pad(rows, (0, -rows.shape[1] % depth, 0, -len(rows) % 64)).contiguous()


@triton.jit
def _load_windows(
    x, y, cells, units, H, LINE,
    KH: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """All units of the windows that begin at units ``cells`` of row ``y``, where ``x`` is, a tensor for each block."""
    loaded = ()
    for block in tl.static_range(BLOCKS):
        at = block * units.shape[0] + units
        row = at // WIDE
        unit = at - row * WIDE
        offsets = tl.where(row < KH, row * LINE + unit, 0)
        # Neighbouring lanes shall read neighbouring units; as ``first`` is not specialised, nothing passes for aligned.
        places = tl.max_contiguous((x + offsets)[None, :] + cells[:, None], [1, 2])
        if MASKED:
            # Far outside if the row is; one unsigned comparison sees both ends.
            unit = tl.where((row < KH) & (y + row >= 0) & (y + row < H), unit, -(1 << 30))
            there = (cells[:, None] + unit[None, :]).to(tl.uint32) < LINE.to(tl.uint32)
            loaded += (tl.load(places, mask=there, other=0),)  # type: ignore[assignment]
        else:
            loaded += (tl.load(places),)  # type: ignore[assignment]
    return loaded


@triton.jit
def _clear(
    a, at, dtype, KH: tl.constexpr, PER: tl.constexpr, WIDE: tl.constexpr, LEAD: tl.constexpr, NUMBERS: tl.constexpr
):
    """Units ``at`` as numbers, zero where they are not of the window: 0 times what is there may be NaN."""
    number = at % WIDE * PER
    there = (at < KH * WIDE) & (number >= LEAD) & (number < LEAD + NUMBERS)
    if PER == 1:
        numbers = tl.where(there[None, :], a, 0.0)
    else:
        next_there = (at < KH * WIDE) & (number + 1 >= LEAD) & (number + 1 < LEAD + NUMBERS)
        a = a & (tl.where(there, 0xFFFF, 0) | tl.where(next_there, -(1 << 16), 0))[None, :]
        even = (a & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        odd = (a >> 16).to(tl.int16).to(dtype, bitcast=True)
        numbers = tl.interleave(even, odd)
    return numbers


@triton.jit(do_not_specialize=["H", "LINE", "OUT_H", "OUT_W", "top", "first"])
def few_channels_kernel(
    x, weight, bias, out, N, H, LINE, OUT_H, OUT_W, top, first, low, high,
    KH: tl.constexpr, PER: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr, STRIDE: tl.constexpr,
    LEAD: tl.constexpr, NUMBERS: tl.constexpr, HAS_BIAS: tl.constexpr, FUNCTION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (images OUT_H ceil(OUT_W / BLOCK_M), ceil(N / BLOCK_N)).

    ``x``: units of (images, H, W, C), int32 if they are two halves; LINE of them are a row. ``weight``: (N or more,
    BLOCKS BLOCK_K), packed. ``out``: (images, OUT_H, OUT_W, N). PER, WIDE, STEP, LEAD, first: see
    :class:`Units`; STEP units from a window to the next, NUMBERS of a row of it.
    """
    x_blocks = tl.cdiv(OUT_W, BLOCK_M)
    line = tl.program_id(0) // x_blocks
    image = line // OUT_H
    y = (line - image * OUT_H) * STRIDE - top
    left = (tl.program_id(0) - line * x_blocks) * BLOCK_M
    begin = left * STEP + first
    local = tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.arange(0, BLOCK_K // PER)
    x_at = x + (image.to(tl.int64) * H + y) * LINE
    weight_at = weight + columns[None, :] * (BLOCKS * BLOCK_K) + tl.arange(0, BLOCK_K)[:, None]
    cells = begin + local * STEP
    if (y >= 0) & (y + KH <= H) & (begin >= 0) & (begin + (BLOCK_M - 1) * STEP + WIDE <= LINE):
        loaded = _load_windows(x_at, y, cells, units, H, LINE, KH, WIDE, BLOCKS, False)
    else:
        loaded = _load_windows(x_at, y, cells, units, H, LINE, KH, WIDE, BLOCKS, True)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b = tl.load(weight_at)
    for block in tl.static_range(BLOCKS):
        at = block * (BLOCK_K // PER) + units
        a = _clear(loaded[block], at, weight.dtype.element_ty, KH, PER, WIDE, LEAD, NUMBERS)
        following = b
        if block + 1 < BLOCKS:
            following = tl.load(weight_at + (block + 1) * BLOCK_K)
        total = tl.dot(a, b, total, input_precision="ieee")
        b = following
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < N).to(tl.float32)[None, :]
    out += (line.to(tl.int64) * OUT_W + left) * N
    inside = (local < OUT_W - left)[:, None] & (columns < N)[None, :]
    tl.store(out + local[:, None] * N + columns[None, :], activate(total, low, high, FUNCTION), mask=inside)


def launch_few_channels(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    units: Units,
    kernel: tuple[int, int],
    tile: Tile,
    stride: tuple[int, int] = (1, 1),
    top: int = 0,
    function: int = CLIP,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Tensor:
    """out = activation(conv(x) + bias), in one launch.

    Args:
        x: (N, H, W, C), dense, beginning at a multiple of 4 bytes. packed: of :func:`pack_weight`, of the same number
            type, for ``units`` and a depth of ``tile.k``. bias: (O,).
        out: (N, OUT_H, OUT_W, O), dense, of any number type; its size says where windows end.
        units: of :func:`count_units`. top: padding above; that on the left is in ``units``.
        function, bounds: of :data:`fpn_kernels.triton.epilogue.FUNCTIONS` and ``clip_bounds``.
    """
    if out.numel() == 0:
        return out
    _, h, w, c = x.shape
    images, out_h, out_w, n = out.shape
    block_n = min(tile.n, max(triton.next_power_of_2(n), 16))
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":  # Triton's interpreter would multiply the bits as integers
        x, packed, units = x.float(), packed.float(), units.split()
    launch(
        few_channels_kernel, (images * out_h * triton.cdiv(out_w, tile.m), triton.cdiv(n, block_n)),
        x.view(-1).view(torch.int32) if units.per == 2 else x, packed, bias, out, n, h, w * c // units.per,
        out_h, out_w, top, units.first, *bounds,
        KH=kernel[0], PER=units.per, WIDE=units.wide, STEP=units.step, STRIDE=stride[0], LEAD=units.lead,
        NUMBERS=kernel[1] * c, HAS_BIAS=bias is not None, FUNCTION=function,
        BLOCK_M=tile.m, BLOCK_N=block_n, BLOCK_K=tile.k, BLOCKS=packed.shape[1] // tile.k,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _build(
    dtype: torch.dtype,
    tile: Tile,
    kernel: int = 7,
    *,
    outputs: int = 64,
    width: int = 1216,
    function: int = CLIP,
) -> Build:
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    units = count_units((kernel, kernel), 3, width, 2, kernel // 2, dtype.itemsize)
    depth = kernel * units.wide * units.per
    return Build(
        kernel=few_channels_kernel,
        variant=f"{name} {'x'.join(map(str, tile))} {kernel}x{kernel} by {units.per}",
        signature={
            "x": "*i32" if units.per == 2 else f"*{name}",
            **dict.fromkeys(("weight", "bias", "out"), f"*{name}"),
            **dict.fromkeys(("N", "H", "LINE", "OUT_H", "OUT_W", "top", "first"), "i32"),
            **dict.fromkeys(("low", "high"), "fp32"),
        },
        constants={
            "KH": kernel, "PER": units.per, "WIDE": units.wide, "STEP": units.step, "STRIDE": 2,
            "LEAD": units.lead, "NUMBERS": 3 * kernel, "HAS_BIAS": True,
            "FUNCTION": function, "BLOCK_M": tile.m, "BLOCK_N": min(tile.n, outputs), "BLOCK_K": tile.k,
            "BLOCKS": -(-depth // tile.k),
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        divisible=("N",),
    )  # fmt: skip


BUILDS = (
    *(_build(torch.float16, tile) for tile in FEW_CHANNELS_TILES),
    *(_build(torch.bfloat16, tile) for tile in FEW_CHANNELS_TILES),
    *(_build(torch.float16, tile, width=1215) for tile in FEW_CHANNELS_TILES[:2]),
    *(_build(torch.float16, tile, 3, outputs=16, function=HARDSWISH) for tile in FEW_CHANNELS_TILES),  # MobileNet's
)
