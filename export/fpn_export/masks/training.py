"""Training of a mask-proposal model: the detectors' trainer with this model's examples and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from fpn_engine.masks.evaluation import Segments, SegmentScore, score_segments
from fpn_engine.masks.ground_truth import SegmentTruth
from fpn_engine.masks.proposals import propose_segments
from fpn_engine.masks.spec import MaskSpec
from fpn_export.detector import FpnDetector
from fpn_export.masks.batches import MaskBatch, make_mask_loader
from fpn_export.masks.examples import MaskExamples
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.step import MaskLoss, compute_mask_losses
from fpn_export.masks.targets import PAPER_EXAMPLES
from fpn_export.training.examples import Examples
from fpn_export.training.processes import join_processes, leave_processes
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
    rate = PAPER_RATE * batch_size / PAPER_BATCH
    values: dict[str, Any] = {
        "learning_rate": rate,
        "anchors_per_image": PAPER_EXAMPLES,
        "milestones": (0.75,),
    } | changes
    return Recipe.from_dict({"steps": steps, "batch_size": batch_size} | values)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskJob:
    """A training run.

    Attributes:
        spec: the model. recipe: see :func:`make_recipe`. output: folder of the run.
        examples: what to learn. data: what identifies them, JSON-ready.
        validation: what the model is scored by, or None.
        device: "cpu", "cuda", or None for whichever is there. restart: forget the run in the folder.
    """

    spec: MaskSpec
    recipe: Recipe
    output: Path
    examples: MaskExamples
    data: Mapping[str, Any]
    validation: SegmentValidation | None = None
    habits: Habits = field(default_factory=Habits)
    device: str | None = None
    restart: bool = False


class SegmentValidation:
    """Scores a model by the average recall of segments. Args: examples: the images of ``truth``, in its order."""

    def __init__(self, truth: SegmentTruth, examples: MaskExamples) -> None:
        self._truth, self._examples = truth, examples

    def __call__(self, model: FpnMasks) -> SegmentScore:
        found = {}
        for number, image in enumerate(self._truth.truth.images):
            proposals = propose_segments(model.pipeline, self._examples[number].pixels)
            found[image.id] = Segments(proposals.run_lengths, proposals.scores)
        return score_segments(self._truth, found)


def train_masks(
    job: MaskJob,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Run ``job``, or take it up where it was stopped; the result is ``best.pth`` and ``last.pth`` in its folder.

    Returns: whether the run is complete.
    Raises: FpnEngineError in one sentence for anything that the caller can put right.
    """
    processes = join_processes(job.device)
    try:
        folder = RunFolder(job.output, alone=processes.is_first)
        try:
            if job.restart and processes.is_first:
                folder.clear()
            processes.wait()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(random_state(job.recipe.seed, INITIAL_WEIGHTS).randint(2**31)))
                model = FpnMasks(job.spec)
            trainer = MaskTrainer(
                # The trainer asks a model for its backbone, spec and weights alone, and hands it to the rest as it is.
                cast(FpnDetector, model),
                cast(Examples, job.examples),
                job.recipe,
                folder,
                processes,
                data=job.data,
                habits=job.habits,
                validation=cast("Validation | None", job.validation),
            )
            return trainer.run(on_progress, should_stop)
        finally:
            folder.close()
    finally:
        leave_processes(processes)


class MaskTrainer(Trainer):
    """The trainer, with batches that have masks and the losses of appendix A."""

    def _make_losses(self) -> nn.Module:
        return _MaskLosses(cast(FpnMasks, self.model), self._recipe)

    def _make_loader(self) -> DataLoader[Any]:
        return make_mask_loader(
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
