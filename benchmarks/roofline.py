"""The floor: the least time that a device needs for a detector's products and bytes (Williams et al. 2009).

How fast the device multiplies and copies is measured in the same process, on large operands, best of several.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import ModelProto

from fpn_engine.spec import ModelSpec
from fpn_export.onnx_cost import HEAD, Cost, count_detector

ITEMSIZES = {"fp32": 4, "fp16": 2, "bf16": 2}  # the precisions whose floor is known
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SIDE, COPIED = {"cuda": 8192, "cpu": 1536}, {"cuda": 1 << 30, "cpu": 128 << 20}  # of matrices; bytes
QUICK_SIDE, QUICK_COPIED = 256, 1 << 20
TRIES = 5
TRUNK, POOLING, PREPROCESS = "trunk", "RoIAlign", "preprocess"


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
    """Of a dense product and of a copy."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """Of one detector on one batch.

    Attributes:
        stages: milliseconds of the stages that move maps. parts: the same within trunk and head, finer.
        macs: multiply-adds of trunk and head.
    """

    stages: Mapping[str, float]
    parts: Mapping[str, float]
    macs: int

    @property
    def whole(self) -> float:
        """Milliseconds of trunk and head, one operation after another."""
        return sum(self.parts.values())

    def beside(self, milliseconds: float) -> dict[str, float]:
        """The roofline columns of a measured time."""
        return {
            "floor_ms": float(f"{self.whole:.4g}"),
            "share_of_floor": float(f"{self.whole / milliseconds:.3g}"),
            "TFLOP_per_s": float(f"{2 * self.macs / milliseconds / 1e9:.4g}"),
        }


def count_floors(
    model: ModelProto, spec: ModelSpec, size: tuple[int, int], batch: int, itemsize: int, peaks: Peaks
) -> Floors:
    """``size``: padded height and width. ``itemsize``: bytes per number of weights and activations."""
    costs = count_detector(model, spec, size, batch=batch, itemsize=itemsize)
    parts = {name: _add_up(listed, peaks) for name, listed in costs.items()}
    cells, pooled = math.prod(size), spec.rpn_post_nms_top_n_test * spec.box_roi_pool.output_size**2
    mapped = sum(cells // 4**level for level in spec.roi_levels)
    stages = {
        PREPROCESS: peaks.milliseconds(batch * 3 * cells * (1 + itemsize)),
        TRUNK: sum(spent for name, spent in parts.items() if name != HEAD),
        POOLING: peaks.milliseconds(batch * spec.feature_channels * (mapped + pooled) * itemsize),
    }
    if HEAD in parts:
        stages[HEAD] = parts[HEAD]
    macs = sum(cost.macs for listed in costs.values() for cost in listed)
    return Floors(stages=_round(stages), parts=_round(parts), macs=macs)


def _add_up(costs: Sequence[Cost], peaks: Peaks) -> float:
    return 1e3 * sum(cost.floor_seconds(peaks.flops, peaks.bandwidth) for cost in costs)


def _round(milliseconds: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{spent:.4g}") for name, spent in milliseconds.items()}
