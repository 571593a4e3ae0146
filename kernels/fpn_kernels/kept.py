"""What NMS kept, in order and padded with zeros: proposals with their RoIs, and detections."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_kernels.checks import require_device, require_dtype, require_shape
from fpn_kernels.registration import Op


def _take(keep: Tensor, values: Tensor) -> Tensor:
    """Rows ``keep`` (N, D) of (N, K) or (N, K, C) values, zeros where keep is -1."""
    index, empty = keep.clamp(min=0), keep < 0
    if values.shape[1] == 0:
        return values.new_zeros(*keep.shape, *values.shape[2:])
    if values.ndim == 3:
        index, empty = index[..., None].expand(-1, -1, values.shape[2]), empty[..., None]
    return values.gather(1, index).masked_fill_(empty, 0)


def number_proposals(boxes: Tensor) -> Tensor:
    """(N, R, 4) float32 boxes as RoIs (N * R, 5) for pooling: the image's number, then the box."""
    n, r = boxes.shape[:2]
    image = torch.arange(n, dtype=torch.float32, device=boxes.device)
    return torch.cat([image[:, None, None].expand(n, r, 1), boxes], dim=2).view(-1, 5)


def take_proposals_reference(keep: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    taken = _take(keep, boxes)
    return taken, _take(keep, scores), number_proposals(taken)


def take_detections_reference(
    keep: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _take(keep, boxes), _take(keep, scores), _take(keep, labels)


def _fake_proposals(keep: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, d = keep.shape
    return boxes.new_empty(n, d, 4), scores.new_empty(n, d), boxes.new_empty(n * d, 5)


def _fake_detections(keep: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, d = keep.shape
    return boxes.new_empty(n, d, 4), scores.new_empty(n, d), labels.new_empty(n, d)


_take_proposals = Op(
    "take_proposals",
    "(Tensor keep, Tensor boxes, Tensor scores) -> (Tensor, Tensor, Tensor)",
    take_proposals_reference,
    "fpn_kernels.triton.kept:launch_take_proposals",
    _fake_proposals,
)
_take_detections = Op(
    "take_detections",
    "(Tensor keep, Tensor boxes, Tensor scores, Tensor labels) -> (Tensor, Tensor, Tensor)",
    take_detections_reference,
    "fpn_kernels.triton.kept:launch_take_detections",
    _fake_detections,
)


def take_proposals(keep: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`fpn_kernels.padded_nms` kept of proposals, and the RoIs to pool.

    Args:
        keep: (N, D) int64, indices into K, -1 for an empty slot.
        boxes: (N, K, 4) float32. scores: (N, K) float32.
    Returns:
        boxes (N, D, 4), scores (N, D), zeros in empty slots; RoIs (N * D, 5), the image's number before each box.
    Raises: ValueError if shape or dtype differ from the above.
    """
    _check(keep, boxes, scores)
    return _take_proposals(boxes.device, keep, boxes, scores)


def take_detections(keep: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`fpn_kernels.padded_nms` kept of candidates.

    Args: as :func:`take_proposals`; labels: (N, K) int64.
    Returns: boxes (N, D, 4), scores (N, D), labels (N, D), zeros in empty slots.
    Raises: ValueError if shape or dtype differ from the above.
    """
    _check(keep, boxes, scores)
    require_shape("labels", labels, *scores.shape)
    require_dtype("labels", labels, torch.int64)
    require_device(keep=keep, labels=labels)
    return _take_detections(boxes.device, keep, boxes, scores, labels)


def _check(keep: Tensor, boxes: Tensor, scores: Tensor) -> None:
    require_shape("scores", scores, None, None)
    n, k = scores.shape
    require_shape("keep", keep, n, None)
    require_shape("boxes", boxes, n, k, 4)
    require_dtype("keep", keep, torch.int64)
    require_dtype("boxes", boxes, torch.float32)
    require_dtype("scores", scores, torch.float32)
    require_device(keep=keep, boxes=boxes, scores=scores)
