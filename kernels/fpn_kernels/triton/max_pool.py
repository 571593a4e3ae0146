"""Maxima of windows in NHWC, without the places of the maxima, which torch writes too. NaN wins."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build

BLOCK_BYTES = 4096  # of the result per program: two 128-bit stores per thread


@triton.jit(do_not_specialize=["M", "H", "W", "OUT_H", "OUT_W"])
def max_pool_kernel(
    x, out, M, C, H, W, OUT_H, OUT_W, top, left,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(M / BLOCK_M), ceil(C / BLOCK_C)). ``x``: (N, H, W, C); ``out``: (M, C), M = N OUT_H OUT_W."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < M)[:, None] & (channels < C)[None, :]
    line = rows // OUT_W
    image = line // OUT_H
    y = (line - image * OUT_H) * STRIDE_H - top
    x_at = (rows - line * OUT_W) * STRIDE_W - left
    largest = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
    for tap in tl.static_range(KH * KW):
        in_y = y + tap // KW * DILATION_H
        in_x = x_at + tap % KW * DILATION_W
        there = (in_y >= 0) & (in_y < H) & (in_x >= 0) & (in_x < W)
        cell = ((image * H + in_y).to(tl.int64) * W + in_x) * C
        value = tl.load(x + cell[:, None] + channels[None, :], mask=inside & there[:, None], other=float("-inf"))
        largest = tl.maximum(largest, value.to(tl.float32), tl.PropagateNan.ALL)
    tl.store(out + rows.to(tl.int64)[:, None] * C + channels[None, :], largest, mask=inside)


def launch_max_pool(
    x: Tensor,
    out: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Maxima of (N, H, W, C), dense, into ``out``, (N, OUT_H, OUT_W, C), dense, whose size says where windows end.

    ``padding``: at the top and at the left; outside the map nothing wins.
    """
    if out.numel() == 0:
        return out
    c = x.shape[-1]
    m = out.numel() // c
    tile = _tile(c, x.element_size())
    max_pool_kernel[(triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(c, tile["BLOCK_C"]))](
        x, out, m, c, *x.shape[1:3], *out.shape[1:3], *padding,
        KH=kernel[0], KW=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1], **tile, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _tile(channels: int, itemsize: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(channels), 512 // itemsize)
    return {"BLOCK_M": max(1, BLOCK_BYTES // itemsize // block), "BLOCK_C": block}


def _build(dtype: torch.dtype, kernel: int, stride: int, channels: int) -> Build:
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return Build(
        kernel=max_pool_kernel,
        variant=f"{name} {kernel}x{kernel}",
        signature={
            **dict.fromkeys(("x", "out"), f"*{name}"),
            **dict.fromkeys(("M", "C", "H", "W", "OUT_H", "OUT_W", "top", "left"), "i32"),
        },
        constants={
            "KH": kernel, "KW": kernel, "STRIDE_H": stride, "STRIDE_W": stride, "DILATION_H": 1, "DILATION_W": 1,
            **_tile(channels, dtype.itemsize),
        },
        divisible=("C",),
    )  # fmt: skip


# The stem's pool and p6.
BUILDS = (
    _build(torch.float16, 3, 2, 64),
    _build(torch.bfloat16, 3, 2, 64),
    _build(torch.float32, 3, 2, 64),
    _build(torch.float16, 1, 2, 256),
)
