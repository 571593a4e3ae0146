"""Mask proposals of a preprocessed batch: scores everywhere, masks at the best places alone (Lin et al. 2017, app. A).

trunk -> the best k of all levels and heads -> windows of the winners -> MLP -> masks and their regions. No NMS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fpn_engine.masks.regions import Regions
from fpn_engine.masks.screening import LayeredAnswer, decide
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.masks.winners import Winners, select_winners
from fpn_engine.pipeline import Proposals
from fpn_engine.preprocessing import preprocess_batch
from fpn_engine.stages import PREPROCESS, PROPOSALS, TRUNK, stage
from fpn_engine.tasks import PaddedMasks, Task
from fpn_kernels import PackedImages, find_nonfinite


class MaskTrunkOutput(NamedTuple):
    """What a trunk makes of images.

    Attributes:
        features: levels (N, d, H_l, W_l), finest first.
        scores: logits (N, A, H_l, W_l) of the A heads.
        exact: where ``scores`` are rough, makes exact ones; then the answer is a :class:`LayeredAnswer`.
    """

    features: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]
    exact: Callable[[], tuple[Tensor, ...]] | None = None


# Images to the above; number of a head, levels and places (R, 4) to mask logits (R, S, S).
MaskTrunk = Callable[[Tensor], MaskTrunkOutput]
MaskAnswer = Callable[[int, Sequence[Tensor], Tensor], Tensor]


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

    @property
    def parts(self) -> tuple[MaskTrunk, MaskAnswer]:
        """The neural parts."""
        return self.trunk, self.answer

    @property
    def captures(self) -> bool:
        """Whether the parts can be recorded in a CUDA graph."""
        return all(getattr(part, "captures", True) for part in self.parts)

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
            winners, masks = self.choose(out, self.spec.masks_per_img if limit is None else limit)
        _, level, y, x = winners.places.unbind(dim=2)
        regions = self._regions.cover(level, winners.heads, y, x)
        status = find_nonfinite([*out.scores, masks])
        counts = torch.full_like(status, winners.logits.shape[1])
        return PaddedMasks(regions, winners.logits.sigmoid(), masks, counts, status)

    def choose(self, out: MaskTrunkOutput, k: int) -> tuple[Winners, Tensor]:
        """The best ``k`` places of each image and their mask logits, (N, K, S, S)."""
        scores = out.scores
        if out.exact is not None:
            if decided := decide(out.features, scores, k, cast(LayeredAnswer, self.answer)):
                return decided
            scores = out.exact()
        winners = select_winners(scores, k)
        return winners, self._answer(out.features, winners)

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
