"""What follows a convolution: bias, residual and activation, in one pass over (N, H, W, C).

The residual may be coarser by whole factors, each of its cells read for several (Lin et al. 2017, fig. 3), down to one
cell per image. Sums are float32, rounded once. ReLU is a clip between 0 and infinity, and NaN stays NaN.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build

BLOCK_BYTES = 8192  # of the result per program: four 128-bit stores per thread
# Kinds that are more than a clip, as the kernels know them.
CLIP, SIGMOID, HARDSWISH = 0, 1, 2
FUNCTIONS = {"none": CLIP, "relu": CLIP, "clip": CLIP, "sigmoid": SIGMOID, "hardswish": HARDSWISH}


def clip_bounds(kind: str, low: float, high: float) -> tuple[float, float]:
    """The bounds that make a clip of an activation; ``low`` and ``high`` are those of "clip" itself."""
    return {"relu": (0.0, math.inf), "clip": (low, high)}.get(kind, (-math.inf, math.inf))


@triton.jit
def activate(x, low, high, FUNCTION: tl.constexpr):
    """The activation of float32 values."""
    if FUNCTION == 1:
        return tl.sigmoid(x)
    if FUNCTION == 2:
        inner = tl.minimum(tl.maximum(x + 3.0, 0.0, tl.PropagateNan.ALL), 6.0, tl.PropagateNan.ALL)
        return x * inner / 6.0
    return tl.minimum(tl.maximum(x, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)


@triton.jit
def find_parents(rows, W, up_h, up_w):
    """The rows of the coarser map that are read for ``rows`` of an (N, H, W) map, H and W whole multiples of its."""
    line = rows // W
    return line // up_h * (W // up_w) + (rows - line * W) // up_w


@triton.jit(do_not_specialize=["M", "H", "W", "up_h", "up_w"])
def finish_kernel(
    x, bias, residual, out, M, C, H, W, up_h, up_w, low, high,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, UPSAMPLED: tl.constexpr, FUNCTION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(M / BLOCK_M), ceil(C / BLOCK_C)). ``x`` and ``out``, which may be one: (M, C), M = N H W."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < M)[:, None] & (channels < C)[None, :]
    at = rows.to(tl.int64)[:, None] * C + channels[None, :]
    total = tl.load(x + at, mask=inside).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channels, mask=channels < C).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        parents = at
        if UPSAMPLED:
            parents = find_parents(rows, W, up_h, up_w).to(tl.int64)[:, None] * C + channels[None, :]
        total += tl.load(residual + parents, mask=inside).to(tl.float32)
    tl.store(out + at, activate(total, low, high, FUNCTION), mask=inside)


def launch_finish(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    upsample: tuple[int, int] = (1, 1),
    function: int = CLIP,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Tensor:
    """out = activation(x + bias + upsampled residual), in one launch.

    Args:
        x: (N, H, W, C) or (R, C), dense. bias: (C,). residual: (N, H / up, W / up, C) or as x, dense.
        out: as x, possibly x itself or a residual that is not upsampled; another number type is fine.
        upsample: how often each cell of the residual is read along H and W, whole fractions of them.
        function, bounds: of :data:`FUNCTIONS` and :func:`clip_bounds`.
    """
    if out.numel() == 0:
        return out
    c = x.shape[-1]
    m = x.numel() // c
    h, w = x.shape[1:3] if x.ndim == 4 else (1, 1)
    tile = _tile(c, out.element_size())
    finish_kernel[(triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(c, tile["BLOCK_C"]))](
        x, bias, residual, out, m, c, h, w, *upsample, *bounds,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, UPSAMPLED=upsample != (1, 1), FUNCTION=function,
        **tile, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _tile(channels: int, itemsize: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(channels), 512 // itemsize)
    return {"BLOCK_M": max(1, BLOCK_BYTES // itemsize // block), "BLOCK_C": block}


def _build(dtype: torch.dtype, variant: str, **flags: int) -> Build:
    name = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    constants = {"HAS_BIAS": True, "HAS_RESIDUAL": False, "UPSAMPLED": False, "FUNCTION": CLIP} | flags
    absent = {} if constants["HAS_RESIDUAL"] else {"residual": None}
    pointers = [p for p in ("x", "bias", "residual", "out") if p not in absent]
    return Build(
        kernel=finish_kernel,
        variant=f"{name} {variant}",
        signature={
            **dict.fromkeys(pointers, f"*{name}"),
            **dict.fromkeys(("M", "C", "H", "W", "up_h", "up_w"), "i32"),
            **dict.fromkeys(("low", "high"), "fp32"),
        },
        constants={**constants, **absent, **_tile(256, dtype.itemsize)},
        divisible=("C",),
    )


BUILDS = (
    _build(torch.float16, "relu"),
    _build(torch.float16, "residual", HAS_RESIDUAL=True),
    _build(torch.float16, "lateral", HAS_RESIDUAL=True, UPSAMPLED=True),
    _build(torch.bfloat16, "residual", HAS_RESIDUAL=True),
    _build(torch.float32, "residual", HAS_RESIDUAL=True),
    _build(torch.float16, "hardswish", FUNCTION=HARDSWISH),
    _build(torch.float16, "sigmoid", FUNCTION=SIGMOID),
)
