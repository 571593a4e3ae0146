"""``fpn-engine train``: annotated images to a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fpn_engine.cli.console import note, suggest
from fpn_engine.cli.options import assignments
from fpn_engine.cli.stopping import StopRequest
from fpn_engine.cli.train_masks import MASKS, train_masks
from fpn_engine.cli.training_display import TrainingDisplay
from fpn_engine.errors import FpnEngineError

DATA, MODEL, RECIPE, RUN = "What to learn", "The model", "The recipe", "The run"
PAPER_EPOCHS = 12  # a tenth more than the 80k steps of 16 images on COCO's 118k


def train(
    annotations: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH",
            help="COCO instances JSON, or a Pascal VOC folder or split; repeatable.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the images that they name, or one for each; VOC knows its own.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    val_annotations: Annotated[
        Path | None, typer.Option(help="What to score on; the best model is kept by it.", rich_help_panel=DATA)
    ] = None,
    val_images: Annotated[Path | None, typer.Option(help="Default: the first --images.", rich_help_panel=DATA)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.", rich_help_panel=RUN)] = Path(
        "run"
    ),
    arch: Annotated[
        str,
        typer.Option(
            help="resnet18, 34, 50 or 101; or fpn-masks, on resnet50 or --set arch=...", rich_help_panel=MODEL
        ),
    ] = "resnet50",
    min_size: Annotated[
        int, typer.Option(help="Pixels of the short side after resizing.", rich_help_panel=MODEL)
    ] = 800,
    max_size: Annotated[int, typer.Option(help="Most pixels of the long side.", rich_help_panel=MODEL)] = 1333,
    fpn_channels: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the pyramid; default 256, of fpn-masks 128.", rich_help_panel=MODEL),
    ] = None,
    representation_size: Annotated[
        int, typer.Option(min=1, help="Width of the box head's hidden layers.", rich_help_panel=MODEL)
    ] = 1024,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=JSON", help="Any other field of the spec; repeatable.", rich_help_panel=MODEL
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="Of the paper's tables: fpn, c4, c5, bottom_up, top_down, finest ...; of fpn-masks 5x5, 7x7, dual or "
            "dual-2x.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="faster_rcnn, fast_rcnn or rpn.", rich_help_panel=MODEL)] = "faster_rcnn",
    proposals: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="What a fast_rcnn classifies, .json or .npz; repeatable.", rich_help_panel=DATA
        ),
    ] = None,
    alternating: Annotated[
        bool, typer.Option("--alternating", help="Four steps with shared features.", rich_help_panel=RECIPE)
    ] = False,
    recipe_: Annotated[
        list[str] | None,
        typer.Option("--recipe", metavar="KEY=JSON", help="Any other field of it; repeatable.", rich_help_panel=RECIPE),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="ImageNet classifier or detector to start from; default: from scratch.", rich_help_panel=RECIPE
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Default 12, with resnet101 24.", rich_help_panel=RECIPE)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates, instead of --epochs.", rich_help_panel=RECIPE)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per update, over all GPUs.", rich_help_panel=RECIPE)] = 16,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Default 0.02 for 16 images, of fpn-masks 0.03, in proportion.", rich_help_panel=RECIPE),
    ] = None,
    schedule: Annotated[str, typer.Option(help="step (at 3/4) or cosine.", rich_help_panel=RECIPE)] = "step",
    warmup: Annotated[int, typer.Option(min=0, help="Updates of linear warm-up.", rich_help_panel=RECIPE)] = 500,
    nesterov: Annotated[bool, typer.Option("--nesterov", help="Nesterov momentum.", rich_help_panel=RECIPE)] = False,
    clip_norm: Annotated[float, typer.Option(min=0, help="Largest gradient norm; 0: any.", rich_help_panel=RECIPE)] = 0,
    scales: Annotated[
        tuple[float, float], typer.Option(help="Range of random factors on the image size.", rich_help_panel=RECIPE)
    ] = (1.0, 1.0),
    brightness: Annotated[float, typer.Option(help="Largest random change, 0.2 for 20 %.", rich_help_panel=RECIPE)] = 0,
    freeze_norm: Annotated[
        bool | None,
        typer.Option(help="Fixed batch norms; default: if --init is a classifier.", rich_help_panel=RECIPE),
    ] = None,
    frozen_stages: Annotated[
        int | None,
        typer.Option(min=0, max=5, help="Default 2 (stem, c2) if --init is a classifier.", rich_help_panel=RECIPE),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.", rich_help_panel=RECIPE)] = "fp32",
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=RECIPE)] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: CUDA if there.", rich_help_panel=RUN)
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images ahead.", rich_help_panel=RUN)] = 0,
    validate_every: Annotated[int, typer.Option(min=1, help="Updates between scores.", rich_help_panel=RUN)] = 1000,
    save_every: Annotated[int, typer.Option(min=1, help="Updates between saved states.", rich_help_panel=RUN)] = 200,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the run in the folder.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Train a detector, or with --arch fpn-masks mask proposals: the paper's recipe, joint and end to end.

    The folder of the run gets best.pth and last.pth, each with its JSON, log.csv and scores.csv. A run that was stopped
    or killed goes on with the same command. Several GPUs: torchrun --nproc-per-node 8 -m fpn_engine train ...
    """
    from fpn_engine.annotations import load_annotations
    from fpn_engine.spec import ModelSpec
    from fpn_export.systems import make_system
    from fpn_export.training.alternating import train_alternating
    from fpn_export.training.initial_weights import is_classifier
    from fpn_export.training.job import Job
    from fpn_export.training.job import train as run_job
    from fpn_export.training.recipe import Recipe, count_steps
    from fpn_export.training.trainer import Habits

    given_recipe: dict[str, Any] = {
        "batch_size": batch,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": warmup,
        "nesterov": nesterov,
        "clip_norm": clip_norm,
        "scales": scales,
        "brightness": brightness,
        "precision": precision,
        "seed": seed,
    }
    from_classifier = init is not None and is_classifier(init)
    given_recipe["freeze_norm"] = from_classifier if freeze_norm is None else freeze_norm
    given_recipe["frozen_stages"] = (2 if from_classifier else 0) if frozen_stages is None else frozen_stages
    if images and len(images) not in (1, len(annotations)):
        raise typer.BadParameter("give one, or one for each --annotations", param_hint="--images")
    if val_images is not None and val_annotations is None:
        raise typer.BadParameter("needs --val-annotations", param_hint="--val-images")
    habits = Habits(validate_every=validate_every, save_every=save_every, workers=workers)
    sizes = {"min_size": min_size, "max_size": max_size}
    set_values = assignments(set_ or [])
    if arch == MASKS:
        if model != "faster_rcnn" or proposals or alternating or representation_size != 1024:
            raise typer.BadParameter(
                "is of detectors", param_hint="--model, --proposals, --alternating, --representation-size"
            )
        train_masks(
            annotations=annotations,
            images=images[0] if images else None,
            val_annotations=val_annotations,
            val_images=val_images,
            output=output,
            spec=sizes | ({} if fpn_channels is None else {"fpn_channels": fpn_channels}) | set_values,
            variant=_choose_variant(system, set_values),
            recipe=given_recipe | assignments(recipe_ or [], "--recipe"),
            steps=steps,
            epochs=PAPER_EPOCHS if epochs is None else epochs,
            habits=habits,
            init=init,
            device=device,
            restart=restart,
        )
        return
    truths = [load_annotations(path) for path in annotations]
    if any(truth.categories != truths[0].categories for truth in truths):
        raise FpnEngineError("the annotation files have different categories; give those of one data set")
    if set_values.get("model", model) != model:
        raise FpnEngineError(f"--set model={set_values['model']} and --model {model} are at odds; give --model alone")
    base = ModelSpec.from_dict(
        {
            "categories": [{"id": c.id, "name": c.name} for c in truths[0].categories],
            "arch": arch,
            "fpn_channels": fpn_channels or 256,
        }
        | sizes
        | set_values
    )
    spec = make_system(base, system or "fpn", model)
    if set_values.get("box_detections_per_img", spec.box_detections_per_img) != spec.box_detections_per_img:
        raise FpnEngineError(f"box_detections_per_img follows from --model {model}; leave it out of --set")
    if epochs is None:
        epochs = PAPER_EPOCHS * (2 if spec.arch == "resnet101" else 1)
    with_objects = sum(len({a.image_id for a in truth.annotations if not a.iscrowd}) for truth in truths)
    given_recipe |= assignments(recipe_ or [], "--recipe")
    steps = steps or count_steps(epochs, with_objects, given_recipe["batch_size"])
    recipe = Recipe.from_dict({"steps": steps} | given_recipe)
    job = Job(
        annotations=annotations,
        images=_find_each(annotations, images),
        val_annotations=val_annotations,
        val_images=_find_val_images(val_annotations, val_images or (images[0] if images else None)),
        output=output,
        spec=spec,
        representation_size=representation_size,
        recipe=recipe,
        habits=habits,
        init=init,
        proposals=proposals or [],
        device=device,
        restart=restart,
    )
    stop = StopRequest()
    with stop, TrainingDisplay(recipe.steps) as display:
        run = train_alternating if alternating else run_job
        outcome = run(job, display.update, stop, note)
    if not outcome.complete:
        note(f"stopped after step {outcome.step} of {recipe.steps}; the same command goes on from there")
        raise SystemExit(stop.exit_code)
    if int(os.environ.get("RANK", 0)) == 0:
        best = "" if outcome.best is None else f", best {'AR1000' if spec.model == 'rpn' else 'AP'} {outcome.best:.3f}"
        note(f"trained {recipe.steps} steps{best}")
        suggest("export", output / "best.pth")


def _choose_variant(system: str | None, set_values: Mapping[str, Any]) -> str | None:
    """Of the mask systems, or none if the values say it all."""
    if "heads" not in set_values:
        return system or "dual"
    if system is not None:
        raise typer.BadParameter("heads follows from --system; give one of them", param_hint="--set")
    return None


def _find_each(annotations: list[Path], named: list[Path] | None) -> list[Path]:
    """The folder of images of each of the annotations."""
    from fpn_engine.annotations import find_images

    if not named:
        return [find_images(path) for path in annotations]
    return named * len(annotations) if len(named) == 1 else named


def _find_val_images(annotations: Path | None, named: Path | None) -> Path | None:
    from fpn_engine.annotations import find_images

    return find_images(annotations) if annotations is not None and named is None else named
