"""The pipeline: from a preprocessed batch to padded detections, the same dataflow for every backend.

trunk -> select -> decode -> NMS per level -> RoIAlign -> box head -> candidates -> NMS per class
(Lin et al. 2017, sec. 4). An RPN alone ends after the first NMS, a Fast R-CNN begins after it with given proposals.
Everything is padded to fixed shapes with counts beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_engine import beside
from fpn_engine.backends import BoxHead, Trunk, TrunkOutput
from fpn_engine.preprocessing import preprocess_batch
from fpn_engine.spec import ModelSpec
from fpn_engine.stages import BOX_HEAD, DETECTIONS, POOLING, PREPROCESS, PROPOSALS, TRUNK, stage
from fpn_engine.tasks import PaddedDetections, Task, Thresholds
from fpn_kernels import (
    PackedImages,
    decode_proposals,
    find_nonfinite,
    make_base_anchors,
    multilevel_roi_align,
    multilevel_roi_pool,
    padded_nms,
    select_candidates,
    select_topk,
    take_detections,
    take_proposals,
)
from fpn_kernels.kept import number_proposals

# Gives the status of a look at what was computed, (N,) int64, once it has been had.
Check = Callable[[], Tensor]


class Proposals(NamedTuple):
    """Class-agnostic boxes, best first (sec. 4.1).

    Attributes:
        boxes: (N, R, 4) float32 in pixels of the resized image, 0 behind the last.
        scores: (N, R) float32, objectness in 0..1, descending, 0 behind the last.
        counts: (N,) int64, how many are real.
        rois: (N * R, 5) float32, the image's number before each box; None where nobody has numbered them yet.
    """

    boxes: Tensor
    scores: Tensor
    counts: Tensor
    rois: Tensor | None = None

    @classmethod
    def given(cls, boxes: Tensor, counts: Tensor) -> Self:
        """Proposals of another detector, without scores; arguments as the attributes."""
        return cls(boxes, boxes.new_ones(boxes.shape[:2]), counts)


class Pipeline:
    """Runs a trunk and a box head, and everything between and behind them.

    Args:
        spec: the model. trunk, head: its two neural parts, on ``device``; an RPN alone has no head.
        fixed_shapes: no shape depends on a value and none is read back, as a captured graph needs it; None has it so
            everywhere but on the CPU, where a look at a count is free and saves the head empty rows.
    """

    def __init__(
        self,
        spec: ModelSpec,
        trunk: Trunk,
        head: BoxHead | None,
        device: torch.device | str = "cpu",
        *,
        fixed_shapes: bool | None = None,
    ) -> None:
        self.spec = spec
        self.trunk = trunk
        self.head = head
        self.device = torch.device(device)
        self._fixed_shapes = self.device.type != "cpu" if fixed_shapes is None else fixed_shapes
        anchors = [make_base_anchors(sizes, spec.aspect_ratios) for sizes in spec.anchor_sizes]
        self._base_anchors = torch.stack(anchors).to(device)
        first = spec.roi_levels[0] - spec.levels[0]
        self._roi_levels = slice(first, first + len(spec.roi_levels) if spec.has_box_head else first)
        self._roi_strides = [float(2**level) for level in spec.roi_levels]

    def preprocess(self, packed: PackedImages, image_sizes: Tensor, padded_size: tuple[int, int]) -> Tensor:
        """(N, 3, *padded_size), as the trunk wants it: float32, or its ``input_dtype`` if it has one.

        Args: image_sizes: (N, 2) int64, resized height and width before padding.
        """
        dtype = getattr(self.trunk, "input_dtype", torch.float32)
        with stage(PREPROCESS):
            return preprocess_batch(self.spec, packed, image_sizes, padded_size, dtype)

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
        with stage(TRUNK):
            out = self.trunk(images)
        check = self._begin_check(out)
        if not self.spec.has_box_head:
            found = self.propose(out, images.shape[-2:], image_sizes, thresholds)
            return _as_detections(found, thresholds.box_detections_per_img, check)
        if proposals is None:
            proposals = self.propose(out, images.shape[-2:], image_sizes)
        return self.classify(out, proposals, image_sizes, thresholds, check)

    def run(
        self, images: Tensor, image_sizes: Tensor, task: Task, proposals: Proposals | None = None
    ) -> PaddedDetections:
        """A task on a preprocessed batch: a call, or :meth:`find_proposals`."""
        if task.thresholds is None:
            return self.find_proposals(images, image_sizes)
        return self(images, image_sizes, task.thresholds, proposals)

    @property
    def parts(self) -> tuple[Trunk, BoxHead | None]:
        """The neural parts."""
        return self.trunk, self.head

    @property
    def captures(self) -> bool:
        """Whether the parts can be recorded in a CUDA graph."""
        return all(getattr(part, "captures", True) for part in self.parts)

    def find_proposals(self, images: Tensor, image_sizes: Tensor) -> PaddedDetections:
        """The RPN's proposals in a preprocessed batch as detections of label 1, rpn_post_nms_top_n_test slots.

        Args: as a call of the pipeline.
        """
        with stage(TRUNK):
            out = self.trunk(images)
        check = self._begin_check(out)
        found = self.propose(out, images.shape[-2:], image_sizes)
        return _as_detections(found, self.spec.rpn_post_nms_top_n_test, check)

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
        with stage(PROPOSALS):
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
            keep, counts = padded_nms(boxes, scores, groups, nms_thresh, spec.rpn_post_nms_top_n_test, k)
            if not self._fixed_shapes:
                keep = keep[:, : max(1, int(counts.max()))]
            boxes, scores, rois = take_proposals(keep, boxes, scores)
            return Proposals(boxes, scores, counts, rois)

    def classify(
        self,
        out: TrunkOutput,
        proposals: Proposals,
        image_sizes: Tensor,
        thresholds: Thresholds,
        check: Check | None = None,
    ) -> PaddedDetections:
        """Fast R-CNN on given proposals (sec. 4.2).

        Args: check: of ``out``, if one is under way.
        """
        if self.head is None:
            raise ValueError("an rpn has no box head")
        spec = self.spec
        of_trunk = check or self._begin_check(out)
        rois = number_proposals(proposals.boxes) if proposals.rois is None else proposals.rois
        with stage(POOLING):
            pooled = self.pool(out, rois, proposals.counts)
        with stage(BOX_HEAD):
            class_logits, box_deltas = self.head(pooled)
        with stage(DETECTIONS):
            n, slots = proposals.boxes.shape[:2]
            answers = [answer.view(n, slots, answer.shape[1]) for answer in (class_logits, box_deltas)]
            of_all = beside.begin(lambda: find_nonfinite(answers, of_trunk()))
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
            keep, counts = padded_nms(boxes, scores, labels, thresholds.box_nms_thresh, limit, slots)
            boxes, scores, labels = take_detections(keep, boxes, scores, labels)
            return PaddedDetections(boxes, scores, labels, counts, of_all())

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

    def _begin_check(self, out: TrunkOutput) -> Check:
        """Look for NaN and infinity in a trunk's output, beside what follows it: the maps live as long as ``out``."""
        return beside.begin(lambda: find_nonfinite([*out.features[self._roi_levels], *out.objectness, *out.deltas]))


def _as_detections(proposals: Proposals, limit: int, check: Check) -> PaddedDetections:
    """The best ``limit`` proposals as detections of label 1, with the status that ``check`` gives."""
    missing = max(0, limit - proposals.scores.shape[1])
    boxes = F.pad(proposals.boxes[:, :limit], (0, 0, 0, missing))
    scores = F.pad(proposals.scores[:, :limit], (0, missing))
    counts = proposals.counts.clamp(max=limit)
    labels = (torch.arange(limit, device=counts.device) < counts[:, None]).to(torch.int64)
    return PaddedDetections(boxes, scores, labels, counts, check())
