"""Train, score and export mask-proposal models, until ``fpn-engine`` does.

python -m fpn_export.masks train runs/dual --scenes 2000 --steps 4000
python -m fpn_export.masks score runs/dual/best.pth --scenes 100 --seed 9
python -m fpn_export.masks export runs/dual/best.pth masks.onnx
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpn_engine.cli.stopping import StopRequest
from fpn_engine.errors import AnnotationError, FpnEngineError
from fpn_engine.files import replacing
from fpn_engine.masks.ground_truth import load_segments
from fpn_engine.masks.spec import MaskSpec
from fpn_export.masks.checkpoint import load_mask_model
from fpn_export.masks.examples import AnnotatedSegments, MaskExamples, SceneExamples
from fpn_export.masks.onnx_export import export_mask_onnx
from fpn_export.masks.training import MaskJob, SegmentValidation, make_recipe, train_masks
from fpn_export.masks.variants import VARIANTS, make_variant
from fpn_export.training.trainer import Habits, Progress

VALIDATION_SEED = 1_000_003  # added to --seed: scenes that are not trained on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns: 0 done, 1 a mistake, told in one sentence, 130 or 143 for a run that was stopped."""
    given = _parser().parse_args(arguments)
    try:
        code: int = given.run(given)
        return code
    except FpnEngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fpn_export.masks", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model, or go on where it was stopped")
    train.set_defaults(run=_train)
    train.add_argument("output", type=Path, help="folder of the run")
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument("--scenes", type=int, help="learn so many generated scenes")
    source.add_argument("--annotations", type=Path, help="learn the COCO annotations of --images")
    train.add_argument("--images", type=Path, help="folder of the annotated images")
    train.add_argument("--val-scenes", type=int, default=0, help="score on so many other scenes")
    train.add_argument("--variant", choices=VARIANTS, default="dual", help="row of table 6")
    train.add_argument("--spec", type=_object, default={}, metavar="JSON", help='such as \'{"arch": "resnet18"}\'')
    train.add_argument("--steps", type=int, default=80_000)
    train.add_argument("--batch", type=int, default=16, help="images per step; the rate follows it")
    train.add_argument("--recipe", type=_object, default={}, metavar="JSON", help="other fields of the recipe")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--save-every", type=int, default=200)
    train.add_argument("--validate-every", type=int, default=1000)
    train.add_argument("--workers", type=int, default=0)
    train.add_argument("--device")
    train.add_argument("--restart", action="store_true", help="forget the run in the folder")

    score = commands.add_parser("score", help="average recall of segments on generated scenes, as JSON")
    score.set_defaults(run=_score)
    score.add_argument("checkpoint", type=Path)
    score.add_argument("--scenes", type=int, default=100)
    score.add_argument("--seed", type=int, default=VALIDATION_SEED)

    export = commands.add_parser("export", help="one self-contained ONNX file")
    export.set_defaults(run=_export)
    export.add_argument("checkpoint", type=Path)
    export.add_argument("output", type=Path)
    return parser


def _object(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def _train(given: argparse.Namespace) -> int:
    spec = make_variant(MaskSpec.from_dict(given.spec), given.variant)
    examples, data = _examples(given)
    validation = None
    if given.val_scenes:
        others = SceneExamples(given.seed + VALIDATION_SEED, given.val_scenes)
        validation = SegmentValidation(others.truth, others)
    job = MaskJob(
        spec=spec,
        recipe=make_recipe(given.steps, given.batch, **{"seed": given.seed, **given.recipe}),
        output=given.output,
        examples=examples,
        data=data,
        validation=validation,
        habits=Habits(validate_every=given.validate_every, save_every=given.save_every, workers=given.workers),
        device=given.device,
        restart=given.restart,
    )
    stop = StopRequest()
    with stop:
        complete = train_masks(job, _print_progress, stop)
    return 0 if complete else stop.exit_code


def _examples(given: argparse.Namespace) -> tuple[MaskExamples, dict[str, Any]]:
    if given.annotations is None:
        if given.scenes < 1:
            raise AnnotationError(f"there is nothing to learn in {given.scenes} scenes; give --scenes a larger number")
        return SceneExamples(given.seed, given.scenes), {"scenes": given.scenes, "seed": given.seed}
    if given.images is None:
        raise AnnotationError(f"{given.annotations} does not say where its images are; name their folder with --images")
    examples = AnnotatedSegments(load_segments(given.annotations), given.images)
    return examples, {"annotations": hashlib.sha256(given.annotations.read_bytes()).hexdigest()}


def _print_progress(progress: Progress) -> None:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
    line = f"{progress.step}/{progress.steps}  {losses}  {progress.seconds:.0f} s"
    if progress.score is not None:
        line += f"  {json.dumps(progress.score.to_dict())}"
    print(line, file=sys.stderr, flush=True)


def _score(given: argparse.Namespace) -> int:
    model, scenes = load_mask_model(given.checkpoint), SceneExamples(given.seed, given.scenes)
    print(json.dumps(SegmentValidation(scenes.truth, scenes)(model).to_dict()))
    return 0


def _export(given: argparse.Namespace) -> int:
    document = export_mask_onnx(load_mask_model(given.checkpoint)).SerializeToString()
    with replacing(given.output) as temporary:
        temporary.write_bytes(document)
    print(f"wrote {given.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
