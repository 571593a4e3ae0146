"""Mask proposals of a preprocessed batch: scores everywhere, masks at the best places alone (Lin et al. 2017, app. A).

trunk -> the best k of all levels and heads -> windows of the winners -> MLP -> masks and their regions. No NMS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpn_engine.masks.regions import Regions
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.pipeline import Proposals
from fpn_engine.preprocessing import preprocess_batch
from fpn_engine.stages import PREPROCESS, PROPOSALS, TRUNK, stage
from fpn_engine.tasks import PaddedMasks, Task
from fpn_kernels import PackedImages, find_nonfinite, select_topk, stable_topk


class MaskTrunkOutput(NamedTuple):
    """Attributes: features: levels (N, d, H_l, W_l), finest first. scores: logits (N, A, H_l, W_l) of the A heads."""

    features: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]


# Images to the above; number of a head, levels and places (R, 4) to mask logits (R, S, S).
MaskTrunk = Callable[[Tensor], MaskTrunkOutput]
MaskAnswer = Callable[[int, Sequence[Tensor], Tensor], Tensor]


class Winners(NamedTuple):
    """The best places of a batch.

    Attributes: logits: (N, K) float32, descending. heads: (N, K) int64. places: (N, K, 4) int64: image, position of the
        level, y, x.
    """

    logits: Tensor
    heads: Tensor
    places: Tensor


def select_winners(scores: Sequence[Tensor], k: int) -> Winners:
    """The ``k`` best of all levels, locations and heads of each image; ties by lower level, y, x, head.

    Args: scores: logits of each level, (N, A, H_l, W_l). NaN ranks last.
    """
    logits, indices, levels = select_topk(scores, k)
    best = stable_topk(logits, min(k, logits.shape[1]))
    index, level = indices.gather(1, best), levels[best]
    n, heads = scores[0].shape[:2]
    widths = torch.tensor([part.shape[3] for part in scores], device=index.device)
    cell = index // heads
    image = torch.arange(n, device=index.device)[:, None].expand_as(cell)
    places = torch.stack([image, level, cell // widths[level], cell % widths[level]], dim=2)
    return Winners(logits.gather(1, best), index % heads, places)


class MaskPipeline:
    """Runs a trunk and heads, and what lies between and behind them.

    Args:
        spec: the model. trunk, answer: its neural parts, on ``device``.
        fixed_shapes: no shape depends on a value and none is read back, at the price of every head's answer at every
            winner; None has it so everywhere but on the CPU.
    """

    def __init__(
        self,
        spec: MaskSpec,
        trunk: MaskTrunk,
        answer: MaskAnswer,
        device: torch.device | str = "cpu",
        *,
        fixed_shapes: bool | None = None,
    ) -> None:
        self.spec, self.trunk, self.answer = spec, trunk, answer
        self.device = torch.device(device)
        self._fixed_shapes = self.device.type != "cpu" if fixed_shapes is None else fixed_shapes
        self._regions = Regions(spec, self.device)

    def preprocess(self, packed: PackedImages, image_sizes: Tensor, padded_size: tuple[int, int]) -> Tensor:
        """(N, 3, *padded_size), as the trunk wants it; see :meth:`fpn_engine.pipeline.Pipeline.preprocess`."""
        dtype = getattr(self.trunk, "input_dtype", torch.float32)
        with stage(PREPROCESS):
            return preprocess_batch(self.spec, packed, image_sizes, padded_size, dtype)

    def run(self, images: Tensor, image_sizes: Tensor, task: Task, proposals: Proposals | None = None) -> PaddedMasks:
        """A task on a preprocessed batch: the best masks, as many as its thresholds say; there are no others.

        Args: image_sizes, proposals: as of a detector; nothing depends on them.
        """
        if task.thresholds is None:
            raise ValueError("a mask-proposal model has no boxes to propose")
        found = self(images, task.thresholds.box_detections_per_img)
        return found._replace(counts=(found.scores >= task.thresholds.box_score_thresh).sum(dim=1))

    @torch.no_grad()
    def __call__(self, images: Tensor, limit: int | None = None) -> PaddedMasks:
        """Propose in a preprocessed batch.

        Args:
            images: (N, 3, H, W), normalised and padded to a multiple of 32.
            limit: proposals per image; None takes the spec's.
        """
        with stage(TRUNK):
            out = self.trunk(images)
        return self.propose(out, limit)

    def propose(self, out: MaskTrunkOutput, limit: int | None = None) -> PaddedMasks:
        """The proposals in what a trunk put out."""
        with stage(PROPOSALS):
            winners = select_winners(out.scores, self.spec.masks_per_img if limit is None else limit)
            masks = self._answer(out.features, winners)
        _, level, y, x = winners.places.unbind(dim=2)
        regions = self._regions.cover(level, winners.heads, y, x)
        status = find_nonfinite([*out.scores, masks])
        counts = torch.full_like(status, winners.logits.shape[1])
        return PaddedMasks(regions, winners.logits.sigmoid(), masks, counts, status)

    def _answer(self, features: Sequence[Tensor], winners: Winners) -> Tensor:
        """Mask logits (N, K, S, S) of the winners, each by its own head."""
        places, heads = winners.places.flatten(0, 1), winners.heads.flatten()
        size = self.spec.mask_size
        masks = torch.zeros(len(places), size, size, device=places.device)
        for number in range(len(self.spec.heads)):
            own = heads == number
            if self._fixed_shapes:
                elsewhere = places.masked_fill(~own[:, None], -1)  # no image: nothing is read for it
                answered = self.answer(number, features, elsewhere).to(torch.float32)
                masks = torch.where(own[:, None, None], answered, masks)
            else:
                chosen = own.nonzero()[:, 0]
                answered = self.answer(number, features, places[chosen])
                masks[chosen] = answered.to(torch.float32)
        return masks.view(*winners.heads.shape, size, size)
