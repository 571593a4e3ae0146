"""The roofline: the least time that a device needs for products and bytes (Williams et al. 2009).

How fast the device multiplies and copies is measured in the same process, on large operands, best of several.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fpn_engine.spec import ModelSpec
from fpn_engine.stages import POOLING, PREPROCESS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # the precisions whose floor is known
SIDE, COPIED = {"cuda": 8192, "cpu": 1536}, {"cuda": 1 << 30, "cpu": 128 << 20}  # of matrices; bytes
QUICK_SIDE, QUICK_COPIED = 256, 1 << 20
TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """Operations and bytes per second; a multiply-add is two operations, a copied byte is read and written."""

    flops: float
    bandwidth: float

    def to_dict(self) -> dict[str, float]:
        return {
            "TFLOP_per_s": float(f"{self.flops / 1e12:.4g}"),
            "GB_per_s": float(f"{self.bandwidth / 1e9:.4g}"),
        }

    def milliseconds(self, moved: int, flops: int = 0) -> float:
        return 1e3 * max(moved / self.bandwidth, flops / self.flops)


@functools.cache
def measure_peaks(device: str, precision: str, quick: bool = False) -> Peaks:
    """Of a dense product and of a copy, on a "cuda" or "cpu" device."""
    side, copied = (QUICK_SIDE, QUICK_COPIED) if quick else (SIDE[device], COPIED[device])
    a, b = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(2))
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    multiplying = min(_time(lambda: torch.mm(a, b), device) for _ in range(TRIES))
    copying = min(_time(lambda: target.copy_(source), device) for _ in range(TRIES))
    return Peaks(flops=2 * side**3 / multiplying, bandwidth=2 * copied / copying)


def _time(function: Callable[[], Any], device: str) -> float:
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def count_mapping(spec: ModelSpec, size: tuple[int, int], batch: int, itemsize: int, peaks: Peaks) -> dict[str, float]:
    """Milliseconds of the stages besides the network that move maps: preprocessing, and RoI pooling if there is any.

    Args:
        size: padded height and width. itemsize: bytes per number of maps.
    """
    cells = math.prod(size)
    found = {PREPROCESS: peaks.milliseconds(batch * 3 * cells * (1 + itemsize))}
    if spec.has_box_head:
        pooled = spec.rpn_post_nms_top_n_test * spec.box_roi_pool.output_size**2
        mapped = sum(cells // 4**level for level in spec.roi_levels)
        found[POOLING] = peaks.milliseconds(batch * spec.feature_channels * (mapped + pooled) * itemsize)
    return found
