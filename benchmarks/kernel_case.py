"""What ``bench_kernels`` measures: an op at one shape of R50-FPN on 800x1216, its rivals, its bytes and products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZE, LEVELS = (800, 1216), ((200, 304), (100, 152), (50, 76), (25, 38), (13, 19))
ROI_LEVELS, STRIDES = LEVELS[:4], (4.0, 8.0, 16.0, 32.0)
ANCHORS, TOP, CLASSES, CHANNELS = 3, 1000, 90, 256
STAGES = (256, 512, 1024, 2048)
SLOTS = [min(TOP, ANCHORS * h * w) for h, w in LEVELS]  # of the proposals, level by level
FILLED = 2000  # candidates of an image, of 20,000 slots
COPY_BANDWIDTH, MATMUL_RATE = 4.3e12, 790e12  # measured on an H200: bytes and fp16 operations per second
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}  # of the largest magnitude


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    """One op at one shape.

    Attributes:
        make_inputs: arguments of a round from its number. contestants: "fpn_kernels" and its rivals by name.
        compare: error of ours against a rival's result. tolerance: of that error.
        expected: what ours must equal exactly, of the same arguments; None where it may round differently.
        moved: bytes read and written once. flops: multiply-adds times two.
        launches: on a GPU, of kernels and of fills, but for those of PyTorch's sort of more than 32,768 boxes.
    """

    name: str
    batch: int
    dtype: torch.dtype
    make_inputs: Callable[[int], tuple[Any, ...]]
    contestants: Mapping[str, Callable[..., Any]]
    compare: Callable[[Any, Any], float]
    tolerance: float
    expected: Callable[..., Any] | None = None
    moved: int
    flops: int = 0
    launches: int


def us(moved: int, flops: int = 0) -> float:
    """The least time that bytes and products need on an H200, in microseconds."""
    return max(moved / COPY_BANDWIDTH, flops / MATMUL_RATE) * 1e6


def largest_error(ours: Any, theirs: Any) -> float:
    """Of tensors or sequences of them, relative to the largest magnitude."""
    if isinstance(ours, Tensor):
        scale = theirs.float().abs().max().clamp(min=1e-6)
        return ((ours.float() - theirs.float()).abs().max() / scale).item()
    return max(largest_error(a, b) for a, b in zip(ours, theirs, strict=True))


def same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))
