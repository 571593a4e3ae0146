"""torchvision's Faster R-CNN as the oracle, and what it means to find the same objects as it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from fpn_engine.detections import Detections
from fpn_engine.spec import ModelSpec
from tests.export.models import STAGE_NAMES

Pixels = NDArray[np.uint8]
STRIDES = (4, 8, 16, 32)
SCORE_TOLERANCE = 1e-3
CORNER_TOLERANCE = 0.1  # pixels of the original image
# A tie is an IoU or a score this close to its threshold: rounding decides it, and either answer is right.
TIE = 1e-3
# An anchor's rank among its level's moves by a few when objectness moves by TIE; so does a proposal's.
RANK_TIE = 3


def build_oracle(
    spec: ModelSpec, *, representation_size: int, rpn_depth: int = 1, state: Mapping[str, Tensor] | None = None
) -> TorchvisionFasterRCNN:
    """torchvision's own model of ``spec``, in eval mode; random weights without ``state``."""
    body = getattr(resnet, spec.arch)(weights=None)
    c5 = body.fc.in_features
    backbone = BackboneWithFPN(body, STAGE_NAMES, [c5 // 8, c5 // 4, c5 // 2, c5], spec.fpn_channels)
    pool = spec.box_roi_pool
    assert not pool.aligned, "torchvision's pooler is not aligned"
    model = TorchvisionFasterRCNN(
        backbone,
        min_size=spec.min_size,
        max_size=spec.max_size,
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
        rpn_anchor_generator=AnchorGenerator(spec.anchor_sizes, (spec.aspect_ratios,) * len(spec.anchor_sizes)),
        rpn_head=RPNHead(spec.fpn_channels, spec.num_anchors, conv_depth=rpn_depth),
        rpn_pre_nms_top_n_test=spec.rpn_pre_nms_top_n_test,
        rpn_post_nms_top_n_test=spec.rpn_post_nms_top_n_test,
        rpn_nms_thresh=spec.rpn_nms_thresh,
        rpn_score_thresh=spec.rpn_score_thresh,
        box_roi_pool=MultiScaleRoIAlign(
            ["0", "1", "2", "3"],
            pool.output_size,
            pool.sampling_ratio,
            canonical_scale=spec.canonical_size,
            canonical_level=spec.canonical_level,
        ),
        box_head=TwoMLPHead(spec.fpn_channels * pool.output_size**2, representation_size),
        box_predictor=FastRCNNPredictor(representation_size, spec.num_classes),
        box_score_thresh=spec.box_score_thresh,
        box_nms_thresh=spec.box_nms_thresh,
        box_detections_per_img=spec.box_detections_per_img,
        bbox_reg_weights=spec.bbox_reg_weights,
    )
    if state is not None:
        model.load_state_dict(state)
    return model.eval()


class Found(NamedTuple):
    """Boxes (n, 4), scores (n,) and labels (n,) of one image."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, detections: Detections) -> Self:
        return cls(detections.boxes, detections.scores, detections.labels)

    def where(self, chosen: NDArray[Any]) -> Self:
        return type(self)(self.boxes[chosen], self.scores[chosen], self.labels[chosen])

    def without(self, chosen: NDArray[np.int64]) -> Self:
        return self.where(np.setdiff1d(np.arange(len(self.scores)), chosen))


class Stages(NamedTuple):
    """What torchvision's model holds on its way through one image."""

    images: ImageList
    features: dict[str, Tensor]
    objectness: list[Tensor]
    deltas: list[Tensor]
    anchors: Tensor
    proposals: Found
    roi_features: Tensor
    class_logits: Tensor
    box_deltas: Tensor
    detections: Found


class Oracle:
    """Asks torchvision about one image at a time, as it pads to the batch and we do not."""

    def __init__(self, model: TorchvisionFasterRCNN) -> None:
        self.model = model

    def resized(self, image: Pixels) -> ImageList:
        """The image as it enters the network: (1, 3, H, W) and its size before padding."""
        return self.model.transform([as_tensor(image)])[0]

    def detect(self, image: Pixels) -> Found:
        """Boxes in pixels of ``image``."""
        self._forget_scales()
        with torch.inference_mode():
            (found,) = self.model([as_tensor(image)])
        self._check_scales()
        return Found(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy())

    def stages(self, image: Pixels) -> Stages:
        """The same, step by step; boxes in pixels of the resized image."""
        self._forget_scales()
        model = self.model
        with torch.inference_mode():
            images = self.resized(image)
            features = model.backbone(images.tensors)
            objectness, deltas = model.rpn.head(list(features.values()))
            anchors = model.rpn.anchor_generator(images, list(features.values()))[0]
            boxes, scores = self._propose(images, anchors, objectness, deltas)
            rois = [torch.from_numpy(boxes)]
            roi_features = model.roi_heads.box_roi_pool(features, rois, images.image_sizes)
            class_logits, box_deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(roi_features))
            found = model.roi_heads.postprocess_detections(class_logits, box_deltas, rois, images.image_sizes)
        self._check_scales()
        detected = Found(*(values[0].numpy() for values in (found[0], found[1], found[2])))
        proposals = Found(boxes, scores, np.ones(len(scores), np.int64))
        return Stages(
            images, features, objectness, deltas, anchors, proposals, roi_features, class_logits, box_deltas, detected
        )

    def wavering(self, image: Pixels) -> Iterator[Found]:
        """What torchvision finds with one threshold at a time moved by TIE."""
        for change in self._moved_thresholds():
            with change:
                yield self.detect(image)

    def wavering_proposals(self, image: Pixels) -> Iterator[Found]:
        for change in self._moved_thresholds():
            with change:
                yield self.stages(image).proposals

    def _propose(
        self, images: ImageList, anchors: Tensor, objectness: list[Tensor], deltas: list[Tensor]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The latter half of ``RegionProposalNetwork.forward``, which keeps the scores to itself."""
        rpn = self.model.rpn
        counts = [level.shape[1:].numel() for level in objectness]
        logits, regression = concat_box_prediction_layers(objectness, deltas)
        decoded = rpn.box_coder.decode(regression, [anchors]).view(1, -1, 4)
        boxes, scores = rpn.filter_proposals(decoded, logits, images.image_sizes, counts)
        return boxes[0].numpy(), scores[0].numpy()

    def _moved_thresholds(self) -> Iterator[Any]:
        rpn, heads = self.model.rpn, self.model.roi_heads
        for delta in (-TIE, TIE):
            yield _changed(heads, "score_thresh", heads.score_thresh + delta)
            yield _changed(heads, "nms_thresh", heads.nms_thresh + delta)
            yield _changed(rpn, "nms_thresh", rpn.nms_thresh + delta)
            rank = int(np.sign(delta)) * RANK_TIE
            for name in ("_pre_nms_top_n", "_post_nms_top_n"):
                yield _changed(rpn, name, {mode: n + rank for mode, n in getattr(rpn, name).items()})
            yield _changed(heads, "detections_per_img", heads.detections_per_img + rank)

    def _forget_scales(self) -> None:
        """The pooler keeps the scales that it inferred from the first image it ever saw."""
        self.model.roi_heads.box_roi_pool.scales = None

    def _check_scales(self) -> None:
        """It infers them from the height before padding, wrongly if padding adds more than 2^0.5 to it."""
        assert self.model.roi_heads.box_roi_pool.scales == [1 / stride for stride in STRIDES], "no oracle for this size"


def as_tensor(image: Pixels) -> Tensor:
    """As torchvision wants it: (3, H, W) float32 in 0..1."""
    return torch.from_numpy(image).permute(2, 0, 1).to(torch.float32) / 255


@contextmanager
def _changed(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@dataclass
class Comparison:
    """What comparing with the oracle showed, image after image.

    Attributes: found, how many detections; tied, how many without a twin, and ties, where; score, corner: the largest
        differences between twins, corners in pixels.
    """

    found: int = 0
    tied: int = 0
    score: float = 0.0
    corner: float = 0.0
    ties: list[str] = field(default_factory=list)

    def assert_twins(
        self,
        ours: Found,
        theirs: Found,
        wavering: Iterator[Found],
        *,
        name: str = "",
        corner_tolerance: float = CORNER_TOLERANCE,
        score_tolerance: float = SCORE_TOLERANCE,
    ) -> None:
        """Every detection of either side has its own twin on the other, or is a tie.

        One of ours alone is a tie if the oracle finds it too with a threshold moved by TIE, one of theirs alone if the
        oracle then loses it. ``wavering`` is only read if there are any.
        """
        tolerances = (corner_tolerance, score_tolerance)
        mine, other = match(ours, theirs, *tolerances)
        self.found += len(theirs.scores)
        if len(mine):
            self.score = max(self.score, float(np.abs(ours.scores[mine] - theirs.scores[other]).max()))
            self.corner = max(self.corner, float(np.abs(ours.boxes[mine] - theirs.boxes[other]).max()))
        extra, missing = ours.without(mine), theirs.without(other)
        if len(extra.scores) + len(missing.scores) == 0:
            return
        self.tied += len(extra.scores) + len(missing.scores)
        self.ties.append(name)
        for moved in wavering:
            still, there = match(theirs, moved, *tolerances)
            extra = extra.without(match(extra, moved.without(there), *tolerances)[0])
            missing = missing.where(match(missing, theirs.where(still), *tolerances)[0])
        assert not len(extra.scores), f"{name}: torchvision does not find {extra}"
        assert not len(missing.scores), f"{name}: only torchvision finds {missing}"


def match(
    a: Found, b: Found, corner_tolerance: float = CORNER_TOLERANCE, score_tolerance: float = SCORE_TOLERANCE
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of twins, one to one, closest first: same class, scores and corners within the tolerances."""
    corners = np.abs(a.boxes[:, None] - b.boxes[None]).max(axis=2) / corner_tolerance
    scores = np.abs(a.scores[:, None] - b.scores[None]) / score_tolerance
    distance = np.maximum(corners, scores)
    distance[a.labels[:, None] != b.labels[None]] = np.inf
    rows, columns = (distance <= 1).nonzero()
    order = np.argsort(distance[rows, columns], kind="stable")
    pairs: list[tuple[int, int]] = []
    seen_a, seen_b = set(), set()
    for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if i not in seen_a and j not in seen_b:
            pairs.append((i, j))
            seen_a.add(i)
            seen_b.add(j)
    matched = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return matched[:, 0], matched[:, 1]


def as_results(image_id: int, found: Found, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO results of one image; ``category_ids`` in label order."""
    x1, y1, x2, y2 = found.boxes.astype(np.float64).T
    bboxes = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": bbox, "score": score}
        for bbox, score, label in zip(bboxes, found.scores.tolist(), found.labels.tolist(), strict=True)
    ]
