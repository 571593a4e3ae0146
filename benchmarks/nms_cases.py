"""NMS as a benchmark: of proposals, of candidates and of plain boxes, against torchvision's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor

import fpn_kernels
from benchmarks.kernel_case import CLASSES, FILLED, SLOTS, TOP, KernelCase
from fpn_kernels.nms import padded_nms_reference
from tests.kernels.boxes import clustered_boxes, random_boxes, seeded

OTHER_BOXES = 1e-3  # of those kept: an IoU that is rounded to the other side of the threshold
MOST_WORDS, CHUNK = 1 << 24, 8192  # as fpn_kernels.triton has them, which not every machine can import


def share_of_other_boxes(ours: Any, theirs: Any) -> float:
    """Of (keep, count) pairs, one an image, how much is kept by one alone: torchvision rounds IoUs by other rules."""
    other = kept = 0
    for (a, a_count), (b, b_count) in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        a_kept, b_kept = set(a[:a_count].tolist()), set(b[:b_count].tolist())
        other += len(a_kept ^ b_kept)
        kept += len(a_kept | b_kept)
    return other / max(kept, 1)


def nms_case(
    device: torch.device,
    name: str,
    make: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    n: int,
    threshold: float,
    limit: int,
    slots: int,
    largest_group: int | None = None,
) -> KernelCase:
    """``make``: boxes (N, K, 4), scores (N, K) and groups (N, K) of a round, K ``slots``."""
    at_once = n * slots * (math.ceil(min(slots, largest_group or slots) / 32) + 1) <= MOST_WORDS

    def inputs(number: int) -> tuple[Any, ...]:
        return tuple(t.to(device) for t in make(number))

    def ours(boxes: Tensor, scores: Tensor, groups: Tensor) -> list[Tensor]:
        return list(fpn_kernels.padded_nms(boxes, scores, groups, threshold, limit, largest_group))

    def theirs(boxes: Tensor, scores: Tensor, groups: Tensor) -> list[Tensor]:
        keep = torch.full((n, limit), -1, device=device)
        counts = torch.zeros(n, dtype=torch.int64, device=device)
        for image in range(n):
            present = (scores[image] > -torch.inf).nonzero()[:, 0]
            arguments = (boxes[image, present], scores[image, present], groups[image, present], threshold)
            kept = present[torchvision.ops.boxes._batched_nms_vanilla(*arguments)][:limit]
            keep[image, : len(kept)] = kept
            counts[image] = len(kept)
        return [keep, counts]

    def offsets(boxes: Tensor, scores: Tensor, groups: Tensor) -> list[Any]:
        """What torchvision's detectors call; it adds offsets to coordinates where boxes are few."""
        kept = []
        for b, s, g in zip(boxes, scores, groups, strict=True):
            present = (s > -torch.inf).nonzero()[:, 0]
            kept.append(present[torchvision.ops.batched_nms(b[present], s[present], g[present], threshold)][:limit])
        return [kept, [len(keep) for keep in kept]]

    def exact(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, ...]:
        return padded_nms_reference(boxes.cpu(), scores.cpu(), groups.cpu(), threshold, limit)

    return KernelCase(
        name=name,
        batch=n,
        dtype=torch.float32,
        make_inputs=inputs,
        contestants={"fpn_kernels": ours, "torchvision, per class": theirs, "torchvision.ops.batched_nms": offsets},
        compare=share_of_other_boxes,
        tolerance=OTHER_BOXES,
        expected=exact,
        moved=n * (28 * slots + 8 * limit),
        launches=7 if at_once else 2 + 3 * math.ceil(slots / CHUNK),
    )


def rpn_nms_case(device: torch.device, n: int) -> KernelCase:
    groups = torch.cat([torch.full((count,), level) for level, count in enumerate(SLOTS)])
    total = sum(SLOTS)

    def make(number: int) -> tuple[Tensor, Tensor, Tensor]:
        boxes = torch.stack([clustered_boxes(total, 300, seed=1000 * number + i) for i in range(n)])
        return boxes, torch.rand(n, total, generator=seeded(number)), groups.expand(n, -1).contiguous()

    return nms_case(device, f"RPN NMS, {total} boxes in 5 levels", make, n, 0.7, TOP, total, TOP)


def final_nms_case(device: torch.device, n: int) -> KernelCase:
    """1000 proposals by 90 classes: 20 slots a proposal, a tenth of them filled."""
    capacity, filled = fpn_kernels.candidate_capacity(TOP, CLASSES + 1, 0.05), FILLED

    def make(number: int) -> tuple[Tensor, Tensor, Tensor]:
        boxes = torch.zeros(n, capacity, 4)
        scores = torch.full((n, capacity), -torch.inf)
        labels = torch.ones(n, capacity, dtype=torch.int64)
        boxes[:, :filled] = torch.stack([clustered_boxes(filled, 60, seed=1000 * number + i) for i in range(n)])
        scores[:, :filled] = 0.05 + 0.95 * torch.rand(n, filled, generator=seeded(number))
        labels[:, :filled] = torch.randint(1, CLASSES + 1, (n, filled), generator=seeded(number))
        return boxes, scores, labels

    return nms_case(device, f"final NMS, {filled} of {capacity} slots", make, n, 0.5, 100, capacity, TOP)


def plain_nms_case(device: torch.device, k: int) -> KernelCase:
    def make(number: int) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.randint(80, (1, k), generator=seeded(number))
        boxes = torch.cat([clustered_boxes(k // 2, 200, seed=number), random_boxes(k - k // 2, seed=number)])
        return boxes[None], torch.rand(1, k, generator=seeded(number)), labels

    return nms_case(device, f"NMS, {k} boxes in 80 classes", make, 1, 0.5, k, k)
