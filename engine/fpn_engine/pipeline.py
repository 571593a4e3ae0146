"""The pipeline: from a preprocessed batch to padded detections, the same dataflow for every backend.

trunk -> select -> decode -> NMS per level -> RoIAlign -> box head -> candidates -> NMS per class
(Lin et al. 2017, sec. 4). An RPN alone ends after the first NMS, a Fast R-CNN begins after it with given proposals.
Everything is padded to fixed shapes with counts beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_engine.backends import BoxHead, Trunk, TrunkOutput
from fpn_engine.spec import ModelSpec
from fpn_kernels import (
    decode_proposals,
    make_base_anchors,
    multilevel_roi_align,
    multilevel_roi_pool,
    padded_nms,
    select_candidates,
    select_topk,
)

OK, NON_FINITE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What may change from call to call without a rebuild; scores and IoUs in 0..1.

    The boxes are the detections; those of an RPN alone are its proposals.
    """

    box_score_thresh: float
    box_nms_thresh: float
    box_detections_per_img: int

    def __post_init__(self) -> None:
        for name in ("box_score_thresh", "box_nms_thresh"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.box_detections_per_img < 1:
            raise ValueError(f"box_detections_per_img must be at least 1, not {self.box_detections_per_img}")

    @classmethod
    def of(cls, spec: ModelSpec) -> Self:
        of_boxes = (spec.box_score_thresh, spec.box_nms_thresh)
        score, nms = of_boxes if spec.has_box_head else (spec.rpn_score_thresh, spec.rpn_nms_thresh)
        return cls(box_score_thresh=score, box_nms_thresh=nms, box_detections_per_img=spec.box_detections_per_img)

    def override(self, **changes: Any) -> Self:
        """A copy with those of ``changes`` that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


class Proposals(NamedTuple):
    """Class-agnostic boxes, best first (sec. 4.1).

    Attributes:
        boxes: (N, R, 4) float32 in pixels of the resized image, 0 behind the last.
        scores: (N, R) float32, objectness in 0..1, descending, 0 behind the last.
        counts: (N,) int64, how many are real.
    """

    boxes: Tensor
    scores: Tensor
    counts: Tensor

    @classmethod
    def given(cls, boxes: Tensor, counts: Tensor) -> Self:
        """Proposals of another detector, without scores; arguments as the attributes."""
        return cls(boxes, boxes.new_ones(boxes.shape[:2]), counts)


class PaddedDetections(NamedTuple):
    """Detections of a batch at fixed capacity D.

    Attributes:
        boxes: (N, D, 4) float32 in pixels of the resized image, 0 behind the last.
        scores: (N, D) float32, descending. labels: (N, D) int64, 1-based, 0 behind the last.
        counts: (N,) int64. status: (N,) int64, 0 or NON_FINITE: the network gave NaN or infinity.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor
    status: Tensor


class Pipeline:
    """Runs a trunk and a box head, and everything between and behind them.

    Args:
        spec: the model. trunk, head: its two neural parts, on ``device``; an RPN alone has no head.
    """

    def __init__(self, spec: ModelSpec, trunk: Trunk, head: BoxHead | None, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.trunk = trunk
        self.head = head
        self.device = torch.device(device)
        anchors = [make_base_anchors(sizes, spec.aspect_ratios) for sizes in spec.anchor_sizes]
        self._base_anchors = torch.stack(anchors).to(device)
        first = spec.roi_levels[0] - spec.levels[0]
        self._roi_levels = slice(first, first + len(spec.roi_levels) if spec.has_box_head else first)
        self._roi_strides = [float(2**level) for level in spec.roi_levels]

    def __call__(
        self, images: Tensor, image_sizes: Tensor, thresholds: Thresholds, proposals: Proposals | None = None
    ) -> PaddedDetections:
        """Detect in a preprocessed batch.

        Args:
            images: (N, 3, H, W), normalised and padded to a multiple of 32.
            image_sizes: (N, 2) int64, resized height and width before padding.
            proposals: of another detector, for a Fast R-CNN; their scores are not used.
        Raises: ValueError for a Fast R-CNN without proposals.
        """
        if proposals is None and not self.spec.has_rpn:
            raise ValueError("a fast_rcnn detects among given proposals, but there are none")
        out = self.trunk(images)
        if not self.spec.has_box_head:
            return self._as_detections(out, self.propose(out, images.shape[-2:], image_sizes, thresholds), thresholds)
        if proposals is None:
            proposals = self.propose(out, images.shape[-2:], image_sizes)
        return self.classify(out, proposals, image_sizes, thresholds)

    def propose(
        self,
        out: TrunkOutput,
        padded_size: Sequence[int],
        image_sizes: Tensor,
        thresholds: Thresholds | None = None,
    ) -> Proposals:
        """The RPN's proposals: k best per level, decoded and clipped, NMS within the level, then the best of all.

        Score and IoU are those of ``thresholds``, which of an RPN alone are the spec's for proposals; None takes these.
        """
        spec = self.spec
        score_thresh = thresholds.box_score_thresh if thresholds else spec.rpn_score_thresh
        nms_thresh = thresholds.box_nms_thresh if thresholds else spec.rpn_nms_thresh
        k = spec.rpn_pre_nms_top_n_test
        logits, indices, levels = select_topk(out.objectness, k)
        boxes, scores = decode_proposals(
            logits,
            indices,
            out.deltas,
            self._base_anchors,
            (padded_size[0], padded_size[1]),
            image_sizes,
            k=k,
            min_size=spec.rpn_min_size,
            score_thresh=score_thresh,
        )
        groups = levels.expand(len(logits), -1)
        keep, counts = padded_nms(boxes, scores, groups, nms_thresh, spec.rpn_post_nms_top_n_test)
        if counts.device.type == "cpu":  # reading a count costs nothing here and saves the head empty rows
            keep = keep[:, : max(1, int(counts.max()))]
        return Proposals(_take(boxes, keep), _take(scores[..., None], keep)[..., 0], counts)

    def _as_detections(self, out: TrunkOutput, proposals: Proposals, thresholds: Thresholds) -> PaddedDetections:
        """The best proposals as detections of label 1."""
        limit = thresholds.box_detections_per_img
        missing = max(0, limit - proposals.scores.shape[1])
        boxes = F.pad(proposals.boxes[:, :limit], (0, 0, 0, missing))
        scores = F.pad(proposals.scores[:, :limit], (0, missing))
        counts = proposals.counts.clamp(max=limit)
        labels = (torch.arange(limit, device=counts.device) < counts[:, None]).to(torch.int64)
        return PaddedDetections(boxes, scores, labels, counts, torch.where(self.find_finite(out), OK, NON_FINITE))

    def classify(
        self, out: TrunkOutput, proposals: Proposals, image_sizes: Tensor, thresholds: Thresholds
    ) -> PaddedDetections:
        """Fast R-CNN on given proposals (sec. 4.2)."""
        if self.head is None:
            raise ValueError("an rpn has no box head")
        spec = self.spec
        n, slots = proposals.boxes.shape[:2]
        image = torch.arange(n, dtype=torch.float32, device=proposals.boxes.device)
        rois = torch.cat([image.repeat_interleave(slots)[:, None], proposals.boxes.reshape(-1, 4)], dim=1)
        class_logits, box_deltas = self.head(self.pool(out, rois, proposals.counts))
        boxes, scores, labels, _ = select_candidates(
            class_logits,
            box_deltas,
            proposals.boxes,
            proposals.counts,
            image_sizes,
            score_thresh=thresholds.box_score_thresh,
            min_size=spec.box_min_size,
            weights=spec.bbox_reg_weights,
        )
        limit = thresholds.box_detections_per_img
        keep, counts = padded_nms(boxes, scores, labels, thresholds.box_nms_thresh, limit)
        finite = self.find_finite(out)
        finite &= _finite(class_logits.view(n, slots, -1), box_deltas.view(n, slots, -1))
        return PaddedDetections(
            _take(boxes, keep),
            _take(scores[..., None], keep)[..., 0],
            _take(labels[..., None], keep)[..., 0],
            counts,
            torch.where(finite, OK, NON_FINITE),
        )

    def pool(self, out: TrunkOutput, rois: Tensor, counts: Tensor | None = None) -> Tensor:
        """RoI features (R, C, S, S) as the spec has it.

        See :func:`fpn_kernels.multilevel_roi_align` and :func:`fpn_kernels.multilevel_roi_pool`.
        """
        spec, pool = self.spec, self.spec.box_roi_pool
        shared: dict[str, Any] = {
            "output_size": pool.output_size,
            "strides": self._roi_strides,
            "min_level": spec.roi_levels[0],
            "canonical_level": spec.canonical_level,
            "canonical_size": spec.canonical_size,
        }
        features = out.features[self._roi_levels]
        if pool.kind == "max":
            return multilevel_roi_pool(features, rois, counts, **shared)
        return multilevel_roi_align(
            features, rois, counts, sampling_ratio=pool.sampling_ratio, aligned=pool.aligned, **shared
        )

    def find_finite(self, out: TrunkOutput) -> Tensor:
        """(N,) bool: which images' trunk outputs are free of NaN and infinity."""
        return _finite(*out.features[self._roi_levels], *out.objectness, *out.deltas)


def _take(values: Tensor, keep: Tensor) -> Tensor:
    """Rows ``keep`` (N, D) of (N, K, C) values, zeros where keep is -1."""
    taken = values.gather(1, keep.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))
    return torch.where(keep[..., None] >= 0, taken, 0)


def _finite(*tensors: Tensor) -> Tensor:
    """(N,) bool: no NaN or infinity in an image's part of any tensor. A sum carries them, at one read each."""
    return torch.stack([t.sum(dim=tuple(range(1, t.ndim)), dtype=torch.float32) for t in tensors]).isfinite().all(dim=0)
