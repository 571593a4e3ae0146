"""One joint training step: both heads' losses on one batch (Lin et al. 2017, sec. 5.1; Ren et al. 2015, sec. 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_engine.backends import TrunkOutput
from fpn_engine.pipeline import Pipeline
from fpn_engine.spec import ModelSpec
from fpn_export.detector import FpnDetector
from fpn_export.training.losses import Loss, box_head_loss, rpn_loss
from fpn_export.training.targets import PAPER_SAMPLES, Objects, Samples, assign_anchors, assign_rois
from fpn_kernels import make_base_anchors
from fpn_kernels.selection import flatten_anchors


def make_anchors(spec: ModelSpec, grids: Sequence[Sequence[int]], padded_size: Sequence[int]) -> Tensor:
    """All anchors of a padded image, (A, 4) float32, level by level in the order (y, x, anchor).

    Args: grids: cells (H_l, W_l) of each level. padded_size: height and width of the batch in pixels.
    """
    anchors = []
    for sizes, (h, w) in zip(spec.anchor_sizes, grids, strict=True):
        y, x = torch.meshgrid(
            torch.arange(h) * (padded_size[0] // h), torch.arange(w) * (padded_size[1] // w), indexing="ij"
        )
        shifts = torch.stack([x, y, x, y], dim=-1)
        anchors.append((shifts[:, :, None] + make_base_anchors(sizes, spec.aspect_ratios)).reshape(-1, 4))
    return torch.cat(anchors)


def with_proposals(spec: ModelSpec, count: int) -> ModelSpec:
    """``spec`` with ``count`` proposals per image, and candidates before NMS in proportion."""
    candidates = count * spec.rpn_pre_nms_top_n_test // spec.rpn_post_nms_top_n_test
    return dataclasses.replace(spec, rpn_pre_nms_top_n_test=max(1, candidates), rpn_post_nms_top_n_test=count)


@torch.no_grad()
def propose(
    model: FpnDetector,
    out: TrunkOutput,
    padded_size: Sequence[int],
    image_sizes: Tensor,
    count: int = PAPER_SAMPLES.proposals,
) -> list[Tensor]:
    """Each image's (R_n, 4) proposals for the box head to learn on, best first; no gradient flows through them."""
    found = Pipeline(with_proposals(model.spec, count), model.trunk, None, image_sizes.device).propose(
        out, padded_size, image_sizes
    )
    return [boxes[:count] for boxes, count in zip(found.boxes, found.counts.tolist(), strict=True)]


def compute_losses(
    model: FpnDetector,
    images: Tensor,
    image_sizes: Tensor,
    batch: Sequence[Objects],
    generator: torch.Generator | None = None,
    *,
    samples: Samples = PAPER_SAMPLES,
    given: Sequence[Tensor] | None = None,
    precision: torch.dtype = torch.float32,
) -> dict[str, Loss]:
    """The losses of a detector's heads on one batch, differentiable in the model's weights.

    Args:
        images: (N, 3, H, W), normalised and padded. image_sizes: (N, 2) int64, resized height and width.
        batch: the objects of each image, boxes in pixels of the resized image.
        generator: for the sampling; None takes torch's global one.
        samples: how many anchors, RoIs and proposals of an image.
        given: proposals of each image, (R_n, 4) float32 in pixels of the resized image, for a Fast R-CNN.
        precision: of trunk and box head; all else is float32.
    Returns: "rpn" for models that have one, "box_head" likewise; the sum of all their parts is minimised.
    """
    spec, padded = model.spec, images.shape[-2:]
    losses = {}
    with _running_in(precision, images.device):
        out = model.trunk(images)
    # float32 from here: the gradients of overlapping RoIs would not add up in bfloat16
    out = TrunkOutput(*(tuple(level.float() for level in part) for part in out))
    if model.has_rpn:
        objectness = torch.cat([flatten_anchors(level, spec.num_anchors)[..., 0] for level in out.objectness], dim=1)
        deltas = torch.cat([flatten_anchors(level, spec.num_anchors) for level in out.deltas], dim=1)
        anchors = make_anchors(spec, [level.shape[-2:] for level in out.objectness], padded).to(images.device)
        learned = assign_anchors(anchors, batch, samples.anchors, generator)
        losses["rpn"] = rpn_loss(
            objectness.flatten(), deltas.reshape(-1, 4), learned.deltas, learned.positives, learned.negatives
        )
    if model.has_box_head:
        proposals = given if given is not None else propose(model, out, padded, image_sizes, samples.proposals)
        rois = assign_rois(proposals, batch, spec.bbox_reg_weights, samples.rois, generator)
        pooled = model.pipeline.pool(out, rois.rois)
        with _running_in(precision, images.device):
            class_logits, box_deltas = model.head(pooled)
        losses["box_head"] = box_head_loss(class_logits, box_deltas, rois.labels, rois.deltas)
    return losses


def _running_in(precision: torch.dtype, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
