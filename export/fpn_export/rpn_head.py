"""RPN head, shared by all levels or one for each (Lin et al. 2017, sec. 4.1; Ren et al. 2015, sec. 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fpn_engine.spec import ModelSpec


class RPNHead(nn.Module):
    """``depth`` 3x3 convolutions with ReLU, then sibling 1x1 convolutions for objectness and deltas.

    Args:
        channels: d, the width of the pyramid.
        num_anchors: A, anchors per location.
        depth: number of 3x3 convolutions; 1 in the paper.
    """

    def __init__(self, channels: int, num_anchors: int, depth: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(depth))
        )
        self.cls_logits = nn.Conv2d(channels, num_anchors, 1)
        self.bbox_pred = nn.Conv2d(channels, 4 * num_anchors, 1)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """One level (N, d, H, W) to objectness logits (N, A, H, W) and deltas (N, 4A, H, W)."""
        hidden = self.conv(level)
        return self.cls_logits(hidden), self.bbox_pred(hidden)


def make_rpn_head(spec: ModelSpec, depth: int) -> RPNHead | nn.ModuleList:
    """The RPN head of a spec, or a list with one for each level, finest first; each of ``depth`` 3x3 convolutions."""
    if spec.rpn_head_shared:
        return RPNHead(spec.feature_channels, spec.num_anchors, depth)
    return nn.ModuleList(RPNHead(spec.feature_channels, spec.num_anchors, depth) for _ in spec.levels)


def answer_levels(head: nn.Module, levels: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Objectness and deltas of each level by what :func:`make_rpn_head` made."""
    heads = head if isinstance(head, nn.ModuleList) else [head] * len(levels)
    objectness, deltas = zip(*(one(level) for one, level in zip(heads, levels, strict=True)), strict=True)
    return objectness, deltas
