"""One training step: the losses of scores and masks at sampled places (Lin et al. 2017, appendix A).

The heads are evaluated at the 128 sampled places of each image alone, which gives what the convolution gives there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_engine.masks.regions import Regions
from fpn_export.masks.batches import MaskBatch, MaskObjects
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.targets import PAPER_EXAMPLES, MaskTargets, assign_examples
from fpn_kernels import roi_align

MASK_WEIGHT = 10.0  # of the mask loss to the score loss
SAMPLES = 4  # per cell of a mask and axis, to tell whether half of it is covered


class MaskLoss(NamedTuple):
    """Two scalars to be added; the mask's is weighted already.

    The trainer adds what it calls ``classification`` and ``box``.
    """

    score: Tensor
    mask: Tensor

    @property
    def classification(self) -> Tensor:
        return self.score

    @property
    def box(self) -> Tensor:
        return self.mask


def cut_masks(objects: MaskObjects, regions: Tensor, numbers: Tensor, size: int) -> Tensor:
    """What masks should look like in their regions: (R, S, S) bool, cells that are half covered or more.

    Args: regions: (R, 4) float32 in pixels of the resized image. numbers: (R,) int64, the object of each. size: S.
    """
    used, own = numbers.unique(return_inverse=True)
    maps = objects.masks[used][:, None].to(torch.float32)
    rois = torch.cat([own[:, None].to(torch.float32), regions * objects.scale.repeat(2)], dim=1)
    covered = roi_align(maps, rois, size, 1.0, SAMPLES, aligned=True)
    return covered[:, 0] >= 0.5


def compute_mask_losses(
    model: FpnMasks,
    batch: MaskBatch,
    generator: torch.Generator | None = None,
    *,
    examples: int = PAPER_EXAMPLES,
    precision: torch.dtype = torch.float32,
) -> dict[str, MaskLoss]:
    """The losses of a model on one batch, differentiable in its weights.

        score: mean binary cross-entropy over all examples;  mask: 10 times that over all cells of the positives

    Args:
        generator: for the sampling; None takes torch's global one. examples: places per image.
        precision: of bottom-up network and pyramid; all else is float32.
    """
    device = batch.images.device
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        levels = model.pyramid(batch.images)
    levels = tuple(level.float() for level in levels)
    regions = Regions(model.spec, device)
    grids = [level.shape[2:] for level in levels]
    targets = assign_examples(regions, grids, [one.boxes for one in batch.objects], examples, generator)
    wanted, positives = _wanted_masks(regions, batch.objects, targets, model.spec.mask_size)
    scores, masks = levels[0].new_zeros(len(targets.heads)), levels[0].new_zeros(wanted.shape)
    for number in range(len(model.spec.heads)):
        own = (targets.heads == number).nonzero()[:, 0]
        own_scores, own_masks = model.head(number, levels, targets.places[own])
        scores = scores.index_copy(0, own, own_scores)
        # Of the masks the positives' alone; a gradient of zero to the rest costs nothing that matters.
        slots = (torch.cumsum(positives, 0) - 1)[own][positives[own]]
        masks = masks.index_copy(0, slots, own_masks[positives[own]])
    score = F.binary_cross_entropy_with_logits(scores, positives.to(torch.float32))
    cells = F.binary_cross_entropy_with_logits(masks, wanted.to(torch.float32), reduction="sum")
    return {"segments": MaskLoss(score, MASK_WEIGHT * cells / max(1, wanted.numel()))}


def _wanted_masks(
    regions: Regions, objects: Sequence[MaskObjects], targets: MaskTargets, size: int
) -> tuple[Tensor, Tensor]:
    """What the positives learn, (P, S, S) bool in their order, and which examples those are, (R,) bool."""
    positives = targets.objects >= 0
    image, level, y, x = targets.places[positives].unbind(dim=1)
    covered = regions.cover(level, targets.heads[positives], y, x)
    numbers = targets.objects[positives]
    parts = [
        cut_masks(one, covered[image == i], numbers[image == i], size)
        for i, one in enumerate(objects)
        if (image == i).any()
    ]
    return torch.cat([covered.new_zeros(0, size, size, dtype=torch.bool), *parts]), positives
