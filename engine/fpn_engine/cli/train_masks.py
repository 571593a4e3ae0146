"""``fpn-engine train --arch fpn-masks``: annotated images with masks to a mask-proposal model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fpn_engine.cli.console import note, suggest
from fpn_engine.cli.stopping import StopRequest
from fpn_engine.cli.training_display import TrainingDisplay
from fpn_engine.errors import FpnEngineError

MASKS = "fpn-masks"


def train_masks(
    *,
    annotations: Sequence[Path],
    images: Path | None,
    val_annotations: Path | None,
    val_images: Path | None,
    output: Path,
    spec: Mapping[str, Any],
    variant: str | None,
    recipe: Mapping[str, Any],
    steps: int | None,
    epochs: float,
    habits: Any,
    init: Path | None,
    device: str | None,
    restart: bool,
) -> None:
    """Train, or take up what was stopped.

    Args: as the options of ``train``; recipe: fields of it. habits: a ``Habits``.
    Raises: FpnEngineError in one sentence; SystemExit for a run that stopped.
    """
    from fpn_engine.ground_truth import check_images, check_objects
    from fpn_engine.masks.ground_truth import load_segments
    from fpn_engine.masks.spec import MaskSpec
    from fpn_export.masks.examples import AnnotatedSegments
    from fpn_export.masks.training import MaskJob, SegmentValidation, make_recipe
    from fpn_export.masks.training import train_masks as run
    from fpn_export.masks.variants import make_variant
    from fpn_export.training.job import identify
    from fpn_export.training.recipe import count_steps

    if len(annotations) != 1:
        raise FpnEngineError("mask proposals are learnt from one annotation file; join them and give that")
    segments = load_segments(annotations[0])
    folder = _need_folder(images, annotations[0])
    examples = AnnotatedSegments(segments, folder)
    validation = None
    if val_annotations is not None:
        truth, val_folder = load_segments(val_annotations), val_images or folder
        pictures = [val_folder / image.file_name for image in truth.truth.images]
        check_images(pictures, val_folder, "--val-images")
        check_objects(truth.truth, val_annotations)
        validation = SegmentValidation(truth, pictures.__getitem__)
    steps = steps or count_steps(epochs, len(examples), recipe["batch_size"])
    made = make_recipe(**({"steps": steps} | dict(recipe)))
    job = MaskJob(
        spec=MaskSpec.from_dict(spec) if variant is None else make_variant(MaskSpec.from_dict(spec), variant),
        recipe=made,
        output=output,
        examples=examples,
        data={"annotations": identify(annotations[0])},
        validation=validation,
        validated_on=None if val_annotations is None else identify(val_annotations),
        habits=habits,
        init=init,
        device=device,
        restart=restart,
    )
    stop = StopRequest()
    with stop, TrainingDisplay(made.steps) as display:
        outcome = run(job, display.update, stop)
    if not outcome.complete:
        note(f"stopped after step {outcome.step} of {made.steps}; the same command goes on from there")
        raise SystemExit(stop.exit_code)
    if int(os.environ.get("RANK", 0)) == 0:
        best = "" if outcome.best is None else f", best AR1000 {outcome.best:.3f}"
        note(f"trained {made.steps} steps{best}")
        suggest("export", output / "best.pth")


def _need_folder(images: Path | None, annotations: Path) -> Path:
    if images is None:
        raise FpnEngineError(f"{annotations} does not say where its images are; name their folder with --images")
    return images
