"""What one training step learns: matched and sampled anchors and RoIs (Lin et al. 2017, secs. 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpn_export.training.losses import encode_boxes
from fpn_export.training.matching import match_boxes
from fpn_export.training.sampling import sample_balanced

ANCHOR_POSITIVES = 0.5
ANCHOR_LOW, ANCHOR_HIGH = 0.3, 0.7
ROI_POSITIVES = 0.25
ROI_IOU = 0.5


class Samples(NamedTuple):
    """How many boxes of an image a step learns from, at most (Lin et al. 2017, secs. 5.1 and 5.2).

    Attributes: anchors for the RPN; rois for the box head; proposals, what the RoIs are drawn from, per level before
        NMS and in all after it: more than in a test, for variety (Ren et al. 2015, sec. 3.3).
    """

    anchors: int = 256
    rois: int = 512
    proposals: int = 2000


PAPER_SAMPLES = Samples()


class Objects(NamedTuple):
    """Ground truth of one image: boxes (M, 4) float32 in pixels of the resized image, labels (M,) int64 from 1."""

    boxes: Tensor
    labels: Tensor


class AnchorTargets(NamedTuple):
    """Sampled anchors of a batch of N images with A anchors each.

    Attributes: positives (P,) and negatives (Q,) int64 into N * A; deltas (P, 4) float32, what the positives learn.
    """

    positives: Tensor
    negatives: Tensor
    deltas: Tensor


class RoITargets(NamedTuple):
    """Sampled RoIs of a batch.

    Attributes: rois (R, 5) float32, batch index and box; labels (R,) int64, 0 is background; deltas (R, 4) float32.
    """

    rois: Tensor
    labels: Tensor
    deltas: Tensor


def assign_anchors(
    anchors: Tensor,
    batch: Sequence[Objects],
    count: int = PAPER_SAMPLES.anchors,
    generator: torch.Generator | None = None,
) -> AnchorTargets:
    """Match and sample ``count`` of the (A, 4) anchors of each image; those outside it are kept (sec. 5.1)."""
    positives, negatives, deltas = [], [], []
    matches = [match_boxes(objects.boxes, anchors, ANCHOR_LOW, ANCHOR_HIGH, keep_best=True) for objects in batch]
    for image, (objects, matched) in enumerate(zip(batch, matches, strict=True)):
        chosen, background = sample_balanced(matched, count, ANCHOR_POSITIVES, generator)
        deltas.append(encode_boxes(objects.boxes[matched[chosen]], anchors[chosen]))
        positives.append(chosen + image * len(anchors))
        negatives.append(background + image * len(anchors))
    return AnchorTargets(torch.cat(positives), torch.cat(negatives), torch.cat(deltas))


def assign_rois(
    proposals: Sequence[Tensor],
    batch: Sequence[Objects],
    weights: Sequence[float],
    count: int = PAPER_SAMPLES.rois,
    generator: torch.Generator | None = None,
) -> RoITargets:
    """Match and sample ``count`` of each image's (R_n, 4) proposals; the objects' own boxes are proposals too."""
    rois, labels, deltas = [], [], []
    for image, (boxes, objects) in enumerate(zip(proposals, batch, strict=True)):
        boxes = torch.cat([boxes, objects.boxes])
        matched = match_boxes(objects.boxes, boxes, ROI_IOU, ROI_IOU)
        positives, negatives = sample_balanced(matched, count, ROI_POSITIVES, generator)
        sampled = torch.cat([positives, negatives]).sort().values
        chosen, index = boxes[sampled], matched[sampled]
        real = index >= 0
        learned = torch.zeros_like(chosen)
        learned[real] = encode_boxes(objects.boxes[index[real]], chosen[real], weights)
        label = torch.zeros_like(index)
        label[real] = objects.labels[index[real]]
        rois.append(torch.cat([chosen.new_full((len(chosen), 1), float(image)), chosen], dim=1))
        labels.append(label)
        deltas.append(learned)
    return RoITargets(torch.cat(rois), torch.cat(labels), torch.cat(deltas))
