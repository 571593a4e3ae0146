"""Matching: which object each box should learn, by IoU (Ren et al. 2015, sec. 3.1.2; Girshick 2015, sec. 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

BACKGROUND, IGNORED = -1, -2


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every pair: (M, 4) and (N, 4) boxes to (M, N)."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.T[:, :, None].contiguous(), b.T.contiguous()
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    intersection = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0).mul_(width)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=-1) for boxes in (a, b)]
    return intersection / (areas[0][:, None] + areas[1] - intersection)


def match_boxes(objects: Tensor, boxes: Tensor, low: float, high: float, *, keep_best: bool = False) -> Tensor:
    """The object that each box is to learn.

    A box takes the object of highest IoU, the first of several, if that IoU is at least ``high``. Below ``low`` it is
    background, between the two it is ignored. ``keep_best`` also gives every object those boxes that overlap it most,
    however little, ties included, so that no object goes unlearned that any box overlaps.

    Args:
        objects: (M, 4) float32 ground truth. boxes: (N, 4) float32, anchors or RoIs.
        low, high: IoU, low <= high.
    Returns: (N,) int64, index of the object, BACKGROUND or IGNORED.
    """
    if len(objects) == 0:
        return torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
    iou = box_iou(objects, boxes)
    best, index = iou.max(dim=0)
    matched = torch.where(best >= high, index, torch.where(best < low, BACKGROUND, IGNORED))
    if keep_best:
        most = ((iou == iou.max(dim=1, keepdim=True).values) & (iou > 0)).any(dim=0)
        matched = torch.where(most, index, matched)
    return matched
