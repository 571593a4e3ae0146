"""How cost grows: an exponent fitted to points, and the memory that a call needs at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Student's t, two-sided 95 %, by degrees of freedom; beyond that the normal distribution's.
STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.96
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what clear_refs takes to set VmHWM to VmRSS: proc(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """y = scale * x^exponent; the exponent lies between ``low`` and ``high`` with 95 % confidence."""

    exponent: float
    low: float
    high: float
    scale: float

    def to_dict(self) -> dict[str, float]:
        return {name: float(f"{getattr(self, name):.4g}") for name in ("exponent", "low", "high", "scale")}


def fit_power(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """A straight line through the logarithms, by least squares.

    Args: xs, ys: positive, three points at least.
    Raises: ValueError for fewer, or for x that are all the same.
    """
    if len(xs) < 3 or len(set(xs)) < 2:
        raise ValueError(f"an exponent needs three points at least, of different x; these are {list(xs)}")
    x, y = np.log(np.asarray(xs, dtype=float)), np.log(np.asarray(ys, dtype=float))
    spread = float(((x - x.mean()) ** 2).sum())
    exponent = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    shift = float(y.mean() - exponent * x.mean())
    freedom = len(xs) - 2
    error = math.sqrt(float(((y - shift - exponent * x) ** 2).sum()) / freedom / spread)
    margin = error * (STUDENT[freedom] if freedom < len(STUDENT) else NORMAL)
    return Fit(exponent=exponent, low=exponent - margin, high=exponent + margin, scale=math.exp(shift))


def measure_peak(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call needs beyond what is there before it; its result counts.

    On a GPU PyTorch's allocator tells; on Linux the process's largest resident size, after memory that was free already
    has been given back to the system. None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text(RESET_PEAK)
        before = _read_status("VmRSS")
        function()
        return max(0, _read_status("VmHWM") - before)
    return None


def _read_status(name: str) -> int:
    """Bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
