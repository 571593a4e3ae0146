"""Non-maximum suppression, exact and greedy, within groups: levels or classes (Ren et al. 2015, sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_kernels.checks import require, require_device, require_dtype, require_shape
from fpn_kernels.overlaps import Overlaps
from fpn_kernels.registration import Op
from fpn_kernels.selection import stable_topk

BLOCK = 2048  # boxes resolved against each other at first; each block is twice the one before
MOST_PAIRS = 1 << 22  # candidate pairs within a block beyond which it is halved, so that memory stays bounded
MOST_ROUNDS = 32  # links of a chain of suppressions that are settled all at once; longer chains are walked along


def padded_nms_reference(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_out: int, largest_group: int | None = None
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
    overlaps = Overlaps(boxes, groups, iou_threshold)
    index = torch.arange(len(boxes), device=boxes.device)
    kept, start, size = index[:0], 0, BLOCK
    while start < len(boxes) and len(kept) < max_out:
        alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        for windows in overlaps.windows(kept, index[start : start + size]):
            for _, worse in overlaps.pairs(windows):
                alive[worse] = False
        while True:
            block = index[start : start + size]
            block = block[alive[block]]
            found = overlaps.windows(block, block)
            if size <= BLOCK or sum(int(windows.counts.sum()) for windows in found) <= MOST_PAIRS:
                break
            size //= 2
        pairs = [pair for windows in found for pair in overlaps.pairs(windows)]
        if pairs:
            better, worse = (torch.cat(side) for side in zip(*pairs, strict=True))
            alive = _fixed_point(better, worse, alive)
        kept = torch.cat([kept, block[alive[block]]])[:max_out]
        start, size = start + size, 2 * size
    return kept


def _fixed_point(better: Tensor, worse: Tensor, alive: Tensor) -> Tensor:
    """The one solution of alive[j] = no alive i suppresses j, over pairs (i, j) with i ranked above j.

    Each round settles at least one more link of every chain of suppressions; chains are short in practice.
    """
    for _ in range(MOST_ROUNDS):
        settled = torch.ones_like(alive)
        settled[worse[alive[better]]] = False
        if torch.equal(settled, alive):
            return alive
        alive = settled
    order = better.argsort()
    one_by_one = [True] * len(alive)
    for i, j in zip(better[order].tolist(), worse[order].tolist(), strict=True):
        if one_by_one[i]:  # settled: all that could suppress it came before
            one_by_one[j] = False
    return torch.tensor(one_by_one, dtype=torch.bool, device=alive.device)


def _fake(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_out: int, largest_group: int | None = None
) -> tuple[Tensor, Tensor]:
    n = scores.shape[0]
    return groups.new_empty(n, max_out), groups.new_empty(n)


_padded_nms = Op(
    "padded_nms",
    "(Tensor boxes, Tensor scores, Tensor groups, float iou_threshold, SymInt max_out, "
    "SymInt? largest_group=None) -> (Tensor, Tensor)",
    padded_nms_reference,
    "fpn_kernels.triton.nms:launch_padded_nms",
    _fake,
)


def padded_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_out: int, largest_group: int | None = None
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
        largest_group: a promise that no group of an image has more present boxes, which saves memory on a GPU, and
            time where slots are many; boxes beyond it may be kept that should not be. None promises nothing.
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
    require(largest_group is None or largest_group >= 0, "largest_group must be at least 0, not {}", largest_group)
    return _padded_nms(boxes.device, boxes, scores, groups, iou_threshold, max_out, largest_group)


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
