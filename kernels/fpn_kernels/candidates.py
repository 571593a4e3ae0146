"""Candidates: what the box head says, as boxes of one class each (Girshick 2015, sec. 2; Lin et al. 2017, sec. 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels.checks import FLOATS, require, require_device, require_dtype, require_shape
from fpn_kernels.decode import clip_boxes, decode_boxes, large_enough
from fpn_kernels.registration import Op


def candidate_capacity(num_proposals: int, num_classes: int, score_thresh: float) -> int:
    """Slots that hold every candidate: softmax sums to 1, so fewer than 1 / t classes of a RoI exceed t.

    The sum may be above 1 by rounding, hence the 1e-5.

    Args: num_proposals per image; num_classes with background; score_thresh 0..1.
    Returns: the number of slots per image.
    """
    return num_proposals * int(min(num_classes - 1, (1 + 1e-5) / max(score_thresh, 1e-9)))


def select_candidates_reference(
    class_logits: Tensor,
    box_deltas: Tensor,
    proposals: Tensor,
    counts: Tensor,
    image_sizes: Tensor,
    score_thresh: float,
    min_size: float,
    weights: Sequence[float],
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, r = proposals.shape[:2]
    foreground = class_logits.shape[1] - 1
    if n * r == 0:
        boxes, labels = proposals.new_zeros(n, capacity, 4), counts.new_ones(n, capacity)
        return boxes, boxes.new_full((n, capacity), -torch.inf), labels, torch.zeros_like(counts)
    scores = class_logits.to(torch.float32).softmax(dim=-1).view(n, r, foreground + 1)[..., 1:]
    present = torch.arange(r, device=counts.device) < counts[:, None]
    chosen = ((scores > score_thresh) & present[..., None]).view(n, -1)
    # Compaction keeps the order (roi, class): the j-th chosen goes to slot j, all others to a slot cut off below.
    slot = torch.where(chosen, chosen.cumsum(dim=1) - 1, capacity).clamp(max=capacity)
    flat = torch.arange(r * foreground, device=slot.device).expand(n, -1)
    source = slot.new_zeros(n, capacity + 1).scatter(1, slot, flat)[:, :capacity]
    filled = torch.arange(capacity, device=slot.device) < chosen.sum(dim=1, keepdim=True)

    roi, label = source // foreground, source % foreground + 1
    image = torch.arange(n, device=slot.device)[:, None]
    deltas = box_deltas.reshape(n, r, foreground + 1, 4)[image, roi, label].to(torch.float32)
    boxes = clip_boxes(decode_boxes(proposals[image, roi], deltas, weights), image_sizes)
    keep = filled & large_enough(boxes, min_size)
    boxes = torch.where(keep[..., None], boxes, 0.0)
    scores = torch.where(keep, scores.reshape(n, -1).gather(1, source), -torch.inf)
    return boxes, scores, label, filled.sum(dim=1)


def _fake(
    class_logits: Tensor,
    box_deltas: Tensor,
    proposals: Tensor,
    counts: Tensor,
    image_sizes: Tensor,
    score_thresh: float,
    min_size: float,
    weights: Sequence[float],
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = proposals.shape[0]
    scores, labels = proposals.new_empty(n, capacity), counts.new_empty(n, capacity)
    return proposals.new_empty(n, capacity, 4), scores, labels, counts.new_empty(n)


_select_candidates = Op(
    "select_candidates",
    "(Tensor class_logits, Tensor box_deltas, Tensor proposals, Tensor counts, Tensor image_sizes, "
    "float score_thresh, float min_size, float[] weights, SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor)",
    select_candidates_reference,
    "fpn_kernels.triton.candidates:launch_select_candidates",
    _fake,
)


def select_candidates(
    class_logits: Tensor,
    box_deltas: Tensor,
    proposals: Tensor,
    counts: Tensor,
    image_sizes: Tensor,
    *,
    score_thresh: float = 0.05,
    min_size: float = 1e-2,
    weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax, threshold, compaction and class-specific decoding in front of the last NMS.

    Every (RoI, foreground class) with softmax score > ``score_thresh`` takes the next slot, in the order
    (RoI, class). Its box is decoded and clipped, and dropped if a side is below ``min_size`` or anything is NaN.

    Args:
        class_logits: (N * R, K + 1), class 0 is background; box_deltas: (N * R, 4 (K + 1)); fp32, fp16 or bf16.
        proposals: (N, R, 4) float32 in pixels of the resized image; counts: (N,) int64, how many are real.
        image_sizes: (N, 2) int64, resized height and width.
        capacity: slots per image; None takes :func:`candidate_capacity`, which always suffices. Candidates beyond it
            are lost, last ones first.
    Returns:
        boxes (N, capacity, 4) float32, 0 where dropped; scores (N, capacity) float32, -inf where dropped or empty;
        labels (N, capacity) int64, 1..K; counts (N,) int64, slots filled.
    Raises: ValueError if shape or dtype differ from the above.
    """
    require_shape("proposals", proposals, None, None, 4)
    n, r = proposals.shape[:2]
    require_shape("class_logits", class_logits, n * r, None)
    require(class_logits.shape[1] >= 2, "class_logits must hold background and at least one class")
    require_shape("box_deltas", box_deltas, n * r, 4 * class_logits.shape[1])
    require_shape("counts", counts, n)
    require_shape("image_sizes", image_sizes, n, 2)
    require_dtype("class_logits", class_logits, *FLOATS)
    require_dtype("box_deltas", box_deltas, *FLOATS)
    require_dtype("proposals", proposals, torch.float32)
    require_dtype("counts", counts, torch.int64)
    require_dtype("image_sizes", image_sizes, torch.int64)
    require_device(
        class_logits=class_logits, box_deltas=box_deltas, proposals=proposals, counts=counts, image_sizes=image_sizes
    )
    require(len(weights) == 4, "weights must be four numbers, not {}", weights)
    require(0.0 <= score_thresh <= 1.0, "score_thresh must be from 0 to 1, not {}", score_thresh)
    if capacity is None:
        capacity = candidate_capacity(r, class_logits.shape[1], score_thresh)
    require(capacity >= 0, "capacity must not be negative: {}", capacity)
    return _select_candidates(
        proposals.device,
        class_logits,
        box_deltas,
        proposals,
        counts,
        image_sizes,
        float(score_thresh),
        float(min_size),
        [float(weight) for weight in weights],
        capacity,
    )
