"""RoIAlign and RoIPool of all levels as a benchmark, against torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor

import fpn_kernels
from benchmarks.kernel_case import CHANNELS, ROI_LEVELS, STRIDES, TOLERANCE, TOP, KernelCase, largest_error
from tests.kernels.boxes import random_boxes, seeded


def roi_align_case(device: torch.device, n: int, dtype: torch.dtype) -> KernelCase:
    return pooling_case(
        device,
        "multi-level RoIAlign, 1000 RoIs an image",
        n,
        dtype,
        {"fpn_kernels": fpn_kernels.multilevel_roi_align, "torchvision.ops.roi_align": roi_align_by_level},
    )


def roi_align_by_level(features: list[Tensor], rois: Tensor) -> Tensor:
    def theirs(feature: Tensor, rois: Tensor, stride: float) -> Tensor:
        return torchvision.ops.roi_align(feature, rois, 7, 1 / stride, 2, False)

    return by_level(theirs)(features, rois)


def roi_pool_case(device: torch.device, n: int, dtype: torch.dtype) -> KernelCase:
    def theirs(feature: Tensor, rois: Tensor, stride: float) -> Tensor:
        return torchvision.ops.roi_pool(feature, rois, 7, 1 / stride)

    rivals = {"fpn_kernels": fpn_kernels.multilevel_roi_pool, "torchvision.ops.roi_pool": by_level(theirs)}
    return pooling_case(device, "multi-level RoIPool, 1000 RoIs an image", n, dtype, rivals)


def by_level(pool: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[list[Tensor], Tensor], Tensor]:
    """torchvision's way: level by level, in float32 as its ops are under autocast, for the sake of the coordinates."""

    def theirs(features: list[Tensor], rois: Tensor) -> Tensor:
        levels = fpn_kernels.assign_levels(rois[:, 1:], 2, 5)
        out = features[0].new_zeros(len(rois), CHANNELS, 7, 7)
        for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True), start=2):
            chosen = (levels == level).nonzero()[:, 0]
            out[chosen] = pool(feature.float(), rois[chosen], stride).to(out.dtype)
        return out

    return theirs


def make_pooling_inputs(
    device: torch.device,
    n: int,
    dtype: torch.dtype,
    number: int,
    count: int = TOP,
    sizes: Sequence[tuple[int, int]] = ROI_LEVELS,
) -> tuple[list[Tensor], Tensor]:
    """Maps of all levels, and ``count`` RoIs an image."""
    levels = [torch.randn(n, CHANNELS, h, w, generator=seeded(number)) for h, w in sizes]
    rois = torch.cat([torch.arange(n).repeat_interleave(count)[:, None], random_boxes(n * count, seed=number)], dim=1)
    return [level.to(device, dtype, memory_format=torch.channels_last) for level in levels], rois.to(device)


def pooling_case(
    device: torch.device,
    name: str,
    n: int,
    dtype: torch.dtype,
    contestants: Mapping[str, Callable[..., Any]],
) -> KernelCase:
    return KernelCase(
        name=name,
        batch=n,
        dtype=dtype,
        make_inputs=partial(make_pooling_inputs, device, n, dtype),
        contestants=contestants,
        compare=largest_error,
        tolerance=TOLERANCE[dtype],
        moved=n * CHANNELS * (sum(h * w for h, w in ROI_LEVELS) + TOP * 49) * dtype.itemsize + n * TOP * 20,
        launches=1,
    )
