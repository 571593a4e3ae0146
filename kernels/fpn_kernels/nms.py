"""Non-maximum suppression, exact and greedy, within groups: levels or classes (Ren et al. 2015, sec. 3.3)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fpn_kernels.checks import require, require_device, require_dtype, require_shape
from fpn_kernels.registration import Op
from fpn_kernels.selection import stable_topk

BLOCK = 2048  # boxes resolved against each other at a time; 250 MB of temporaries if they all coincide
PAIRS = 1 << 21  # candidate pairs whose IoU is computed at a time: about 100 MB of temporaries
# IoU > t needs the second box to begin within (1 - t) of the first one's width. The slack is far above the rounding
# of the float32 IoU; where areas leave float32's normal range their rounding is unbounded and no pair is ruled out.
SLACK = 1e-4
SMALLEST_AREA = 1e-30


def box_iou_pairs(a: Tensor, b: Tensor) -> Tensor:
    """IoU of matching rows of two (P, 4) float32 tensors; 0 / 0 is NaN, which exceeds no threshold."""
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    intersection = overlap[:, 0] * overlap[:, 1]
    return intersection / (_areas(a) + _areas(b) - intersection)


def padded_nms_reference(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_out: int
) -> tuple[Tensor, Tensor]:
    keep = torch.full((len(scores), max_out), -1, dtype=torch.int64, device=scores.device)
    counts = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    present = ~(scores.isnan() | (scores == -torch.inf)) & boxes.isfinite().all(dim=-1)
    for n in range(len(scores)):
        index = present[n].nonzero()[:, 0]
        ranked = index[stable_topk(scores[n, index][None], len(index))[0]]
        kept = ranked[_suppress(boxes[n, ranked], groups[n, ranked], iou_threshold, max_out)]
        keep[n, : len(kept)] = kept
        counts[n] = len(kept)
    return keep, counts


def _suppress(boxes: Tensor, groups: Tensor, iou_threshold: float, max_out: int) -> Tensor:
    """Indices of the first ``max_out`` boxes that survive, of boxes in descending order of score."""
    _, groups = groups.unique(return_inverse=True)
    kept = torch.empty(0, dtype=torch.int64, device=boxes.device)
    for block in torch.arange(len(boxes), device=boxes.device).split(BLOCK):
        _, hit = _overlapping_pairs(boxes, groups, kept, block, iou_threshold)
        alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        alive[hit] = False
        block = block[alive[block]]
        better, worse = _overlapping_pairs(boxes, groups, block, block, iou_threshold)
        kept = torch.cat([kept, block[_fixed_point(better, worse, alive)[block]]])[:max_out]
        if len(kept) == max_out:
            break
    return kept


def _fixed_point(better: Tensor, worse: Tensor, alive: Tensor) -> Tensor:
    """The one solution of alive[j] = no alive i suppresses j, over pairs (i, j) with i ranked above j.

    Each round settles at least one more link of every chain of suppressions; chains are short in practice.
    """
    while True:
        settled = torch.ones_like(alive)
        settled[worse[alive[better]]] = False
        if torch.equal(settled, alive):
            return alive
        alive = settled


def _overlapping_pairs(
    boxes: Tensor, groups: Tensor, first: Tensor, second: Tensor, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """All pairs (i, j), i < j, i in ``first``, j in ``second``, of one group and with IoU above the threshold."""
    sides = [(first, second)] if first is second else [(first, second), (second, first)]
    pairs = [pair for left, right in sides for pair in _sweep(boxes, groups, left, right, iou_threshold)]
    if not pairs:
        return first[:0], second[:0]
    i, j = (torch.cat(side) for side in zip(*pairs, strict=True))
    return torch.minimum(i, j), torch.maximum(i, j)


def _sweep(
    boxes: Tensor, groups: Tensor, left: Tensor, right: Tensor, iou_threshold: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Overlapping pairs whose right box begins inside the window of x that IoU > threshold leaves it."""
    if len(left) == 0 or len(right) == 0:
        return
    x1 = boxes[right, 0]
    by_x = x1.argsort()
    # Position in the order of x1, made distinct by group, so that one search finds the window within the group.
    position = torch.empty_like(by_x)
    position[by_x] = torch.arange(len(right), device=boxes.device)
    keys, order = (groups[right] * len(right) + position).sort()
    width = (boxes[left, 2] - boxes[left, 0]).to(torch.float64)
    reach = torch.where(_areas(boxes[left]) < SMALLEST_AREA, 1.0, 1.0 - iou_threshold + SLACK) * width
    sorted_x1 = x1[by_x].to(torch.float64)
    start = boxes[left, 0].to(torch.float64)
    base = groups[left] * len(right)
    begin = torch.searchsorted(keys, base + torch.searchsorted(sorted_x1, start))
    end = torch.searchsorted(keys, base + torch.searchsorted(sorted_x1, start + reach, right=True))
    counts = (end - begin).clamp(min=0)
    for chunk in _chunks(counts, PAIRS):
        number = counts[chunk]
        i = left[chunk].repeat_interleave(number)
        within = torch.arange(len(i), device=boxes.device) - (number.cumsum(0) - number).repeat_interleave(number)
        j = right[order[begin[chunk].repeat_interleave(number) + within]]
        hit = (box_iou_pairs(boxes[i], boxes[j]) > iou_threshold) & (i != j)
        yield i[hit], j[hit]


def _chunks(counts: Tensor, limit: int) -> list[slice]:
    """Slices of ``counts`` that sum to about ``limit`` at most, each at least one long."""
    group = counts.cumsum(0) // limit
    edges = [0, *(1 + (group[1:] != group[:-1]).nonzero()[:, 0]).tolist(), len(counts)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _fake(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_out: int) -> tuple[Tensor, Tensor]:
    n = scores.shape[0]
    return groups.new_empty(n, max_out), groups.new_empty(n)


_padded_nms = Op(
    "padded_nms",
    "(Tensor boxes, Tensor scores, Tensor groups, float iou_threshold, SymInt max_out) -> (Tensor, Tensor)",
    padded_nms_reference,
    "fpn_kernels.triton.nms:launch_padded_nms",
    _fake,
)


def padded_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_out: int
) -> tuple[Tensor, Tensor]:
    """Greedy NMS within each group of each image, at fixed capacity.

    By descending score, ties by lower index: a box is kept unless a kept box of its group overlaps it with
    IoU > ``iou_threshold`` (both in float32, no coordinate offsets). Boxes whose score is -inf are empty slots;
    a NaN score or a non-finite coordinate drops the box. Inverted and zero-area boxes overlap nothing.

    Args:
        boxes: (N, K, 4) float32, x1 y1 x2 y2.
        scores: (N, K) float32.
        groups: (N, K) int64, any values: class or level.
        iou_threshold: 0..1. max_out: most boxes to keep per image.
    Returns:
        keep: (N, max_out) int64, indices into K by descending score, -1 behind the last.
        counts: (N,) int64, how many were kept.
    Raises: ValueError if shape, dtype or threshold differ from the above.
    """
    require_shape("scores", scores, None, None)
    n, k = scores.shape
    require_shape("boxes", boxes, n, k, 4)
    require_shape("groups", groups, n, k)
    require_dtype("boxes", boxes, torch.float32)
    require_dtype("scores", scores, torch.float32)
    require_dtype("groups", groups, torch.int64)
    require_device(boxes=boxes, scores=scores, groups=groups)
    require(0.0 <= iou_threshold <= 1.0, "iou_threshold must be from 0 to 1, not {}", iou_threshold)
    require(max_out >= 1, "max_out must be at least 1, not {}", max_out)
    return _padded_nms(boxes.device, boxes, scores, groups, iou_threshold, max_out)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Indices that survive NMS within each class, by descending score; ``torchvision.ops.batched_nms``'s form.

    Unlike it, never by adding offsets to coordinates: see :func:`padded_nms` for the exact semantics.

    Args: boxes (K, 4) float32; scores (K,) float32; idxs (K,) integer class of each box; iou_threshold 0..1.
    Returns: (kept,) int64.
    """
    k = boxes.shape[0]
    if k == 0:
        require_shape("boxes", boxes, 0, 4)
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    groups = idxs.to(torch.int64)
    keep, counts = padded_nms(boxes[None], scores[None], groups[None], iou_threshold, k)
    return keep[0, : int(counts[0])]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """:func:`batched_nms` with all boxes in one class; ``torchvision.ops.nms``'s form.

    Args: boxes (K, 4) float32; scores (K,) float32; iou_threshold 0..1.
    Returns: (kept,) int64.
    """
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold)
