"""Sampling: the few boxes of an image that a step learns from (Ren et al. 2015, sec. 3.1.3; Girshick 2015)."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_export.training.matching import BACKGROUND


def sample_balanced(
    matched: Tensor, count: int, positive_fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw boxes without replacement: at most ``positive_fraction`` of ``count`` positive, the rest background.

    Args:
        matched: (N,) int64 from :func:`match_boxes`; ignored boxes are never drawn.
        count: 256 anchors or 512 RoIs per image in the paper. positive_fraction: 0.5 for anchors, 0.25 for RoIs.
        generator: None takes torch's global one.
    Returns: indices of the positives and of the negatives drawn, int64, ascending.
    """
    positives = (matched >= 0).nonzero()[:, 0]
    negatives = (matched == BACKGROUND).nonzero()[:, 0]
    positives = _draw(positives, min(int(count * positive_fraction), len(positives)), generator)
    negatives = _draw(negatives, min(count - len(positives), len(negatives)), generator)
    return positives, negatives


def _draw(candidates: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    order = torch.randperm(len(candidates), device=candidates.device, generator=generator)
    return candidates[order[:count]].sort().values
