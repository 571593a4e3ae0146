"""The losses of the RPN and of the box head (Ren et al. 2015, eq. 1; Girshick 2015, eqs. 1-3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH_L1_BETA = 1 / 9  # where the box loss turns from quadratic to linear, in units of the box coding


class Loss(NamedTuple):
    """A head's two scalar losses, to be added; ``Recipe.box_weight`` weighs the second."""

    classification: Tensor
    box: Tensor


def encode_boxes(objects: Tensor, boxes: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The deltas that :func:`fpn_kernels.decode_boxes` turns ``boxes`` into ``objects`` by; both (N, 4) float32."""
    box_size, object_size = (b[:, 2:] - b[:, :2] for b in (boxes, objects))
    box_centre, object_centre = (b[:, :2] + 0.5 * size for b, size in ((boxes, box_size), (objects, object_size)))
    deltas = torch.cat([(object_centre - box_centre) / box_size, torch.log(object_size / box_size)], dim=1)
    return deltas * torch.tensor(weights, dtype=deltas.dtype, device=deltas.device)


def rpn_loss(objectness: Tensor, deltas: Tensor, targets: Tensor, positives: Tensor, negatives: Tensor) -> Loss:
    """Binary cross-entropy over the sampled anchors, smooth L1 over the positive ones, both per sampled anchor.

    Args:
        objectness: (N,) logits and deltas: (N, 4) of all anchors of the batch.
        targets: (P, 4) encoded objects of the positives. positives: (P,), negatives: (Q,) int64 into N.
    """
    sampled = torch.cat([positives, negatives])
    labels = torch.cat([torch.ones_like(positives), torch.zeros_like(negatives)]).to(torch.float32)
    classification = F.binary_cross_entropy_with_logits(objectness[sampled].float(), labels)
    return Loss(classification, _box_loss(deltas[positives], targets, len(sampled)))


def box_head_loss(class_logits: Tensor, box_deltas: Tensor, labels: Tensor, targets: Tensor) -> Loss:
    """Cross-entropy over all sampled RoIs, smooth L1 of the true class's box over the positive ones, both per RoI.

    Args:
        class_logits: (R, K + 1); box_deltas: (R, 4 (K + 1)); labels: (R,) int64, 0 is background.
        targets: (R, 4) encoded objects; rows of background are not read.
    """
    positives = (labels > 0).nonzero()[:, 0]
    per_class = box_deltas.view(len(labels), -1, 4)
    chosen = per_class[positives, labels[positives]]
    return Loss(
        F.cross_entropy(class_logits.float(), labels), _box_loss(chosen, targets[positives], max(1, len(labels)))
    )


def _box_loss(deltas: Tensor, targets: Tensor, count: int) -> Tensor:
    return F.smooth_l1_loss(deltas.float(), targets, beta=SMOOTH_L1_BETA, reduction="sum") / count
