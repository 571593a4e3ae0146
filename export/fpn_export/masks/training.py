"""Training of a mask-proposal model: the detectors' trainer with this model's examples and losses."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fpn_engine.engine import Engine
from fpn_engine.masks.evaluation import Segments, SegmentScore, score_segments
from fpn_engine.masks.ground_truth import SegmentTruth
from fpn_engine.masks.spec import MaskSpec
from fpn_export.detector import FpnDetector
from fpn_export.masks.batches import MaskBatch, load_mask_batches
from fpn_export.masks.examples import MaskExamples
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.step import MaskLoss, compute_mask_losses
from fpn_export.masks.targets import PAPER_EXAMPLES
from fpn_export.training.examples import Examples
from fpn_export.training.initial_weights import load_initial_weights
from fpn_export.training.job import Outcome, forget_run, joined
from fpn_export.training.randomness import INITIAL_WEIGHTS, random_state
from fpn_export.training.recipe import PAPER_BATCH, Recipe
from fpn_export.training.run_folder import RunFolder
from fpn_export.training.trainer import DTYPES, Habits, Progress, Trainer
from fpn_export.training.validation import Validation

PAPER_RATE = 0.03  # for 16 images
PAPER_STEPS = 80_000  # divided by 10 after 60k; doubled in the last row of table 6


def make_recipe(steps: int = PAPER_STEPS, batch_size: int = PAPER_BATCH, **changes: Any) -> Recipe:
    """Appendix A's recipe, the rate in proportion to the batch; ``changes`` are fields of :class:`Recipe`.

    ``anchors_per_image`` is how many places of an image a step learns from: places times heads are what anchors are to
    an RPN.

    Raises: SpecError for an unknown field or a value outside its range.
    """
    values: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "anchors_per_image": PAPER_EXAMPLES}
    recipe = Recipe.from_dict(values | changes)
    rate = PAPER_RATE * recipe.batch_size / PAPER_BATCH
    return recipe if recipe.learning_rate is not None else dataclasses.replace(recipe, learning_rate=rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskJob:
    """A training run.

    Attributes:
        spec: the model. recipe: see :func:`make_recipe`. output: folder of the run.
        examples: what to learn. data: what identifies them, JSON-ready.
        validation: what the model is scored by, or None. validated_on: what identifies its images.
        init: a file for :func:`fpn_export.training.initial_weights.load_initial_weights`, or None: from scratch.
        device: "cpu", "cuda", or None for whichever is there. restart: forget the run in the folder.
    """

    spec: MaskSpec
    recipe: Recipe
    output: Path
    examples: MaskExamples
    data: Mapping[str, Any]
    validation: SegmentValidation | None = None
    validated_on: str | None = None
    habits: Habits = field(default_factory=Habits)
    init: Path | None = None
    device: str | None = None
    restart: bool = False


class SegmentValidation:
    """Scores a model by the average recall of segments.

    Args: picture: the pixels or the path of each image of ``truth``, by its position there.
    """

    def __init__(self, truth: SegmentTruth, picture: Callable[[int], NDArray[np.uint8] | Path]) -> None:
        self._truth, self._picture = truth, picture

    def __call__(self, model: FpnMasks) -> SegmentScore:
        engine, found = Engine(model.pipeline, graphs=False), {}
        for number, image in enumerate(self._truth.truth.images):
            (proposals,) = engine(self._picture(number))
            found[image.id] = Segments(proposals.run_lengths or (), proposals.scores)
        return score_segments(self._truth, found)


def train_masks(
    job: MaskJob,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run ``job``, or take it up where it was stopped; the result is ``best.pth`` and ``last.pth`` in its folder.

    Raises: FpnEngineError in one sentence for anything that the caller can put right.
    """
    with (
        joined(job.device, job.recipe.batch_size) as processes,
        contextlib.closing(RunFolder(job.output, alone=processes.is_first)) as folder,
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random_state(job.recipe.seed, INITIAL_WEIGHTS).randint(2**31)))
            model = FpnMasks(job.spec)
        # Both ask a model for tensors, backbone and spec alone, and hand it to the rest as it is.
        taken = load_initial_weights(cast(FpnDetector, model), job.init) if job.init else None
        if job.restart:
            forget_run(folder, processes, job.init)
        trainer = MaskTrainer(
            cast(FpnDetector, model),
            cast(Examples, job.examples),
            job.recipe,
            folder,
            processes,
            data={**job.data, "init": taken.sha256 if taken else None},
            habits=job.habits,
            validation=cast("Validation | None", job.validation),
            validated_on=job.validated_on,
        )
        complete = trainer.run(on_progress, should_stop)
        return Outcome(complete=complete, step=trainer.step, best=trainer.best)


class MaskTrainer(Trainer):
    """The trainer, with batches that have masks and the losses of appendix A."""

    def _make_losses(self) -> nn.Module:
        return _MaskLosses(cast(FpnMasks, self.model), self._recipe)

    def _reaches_all_weights(self) -> bool:
        return False  # a level on which no place is drawn gets none

    def _load_batches(self) -> Iterator[Any]:
        return load_mask_batches(
            cast(MaskExamples, self._examples),
            cast(MaskSpec, self.model.spec),
            self._recipe,
            first_step=self.step,
            rank=self._processes.rank,
            world_size=self._processes.world_size,
            workers=self._habits.workers,
        )


class _MaskLosses(nn.Module):
    """A model whose forward pass gives its losses, as DistributedDataParallel wants it."""

    def __init__(self, model: FpnMasks, recipe: Recipe) -> None:
        super().__init__()
        self.model, self._recipe = model, recipe

    def forward(self, batch: MaskBatch, generator: torch.Generator) -> dict[str, MaskLoss]:
        return compute_mask_losses(
            self.model,
            batch,
            generator,
            examples=self._recipe.anchors_per_image,
            precision=DTYPES[self._recipe.precision],
        )
