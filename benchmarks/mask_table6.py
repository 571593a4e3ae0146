"""Table 6 on generated scenes: average recall of segments for each of its rows, small enough for two cores.

    python -m benchmarks.mask_table6 runs/table6 [--steps 1000] [-o benchmarks/results/masks_table6.json]

Rows, in the paper's order: the 5x5 MLP, the 7x7 MLP, both, both with 28x28 masks, and that with the doubled schedule.
All learn the same scenes for ``--steps`` updates, the last one for twice as many, by appendix A's recipe for batches of
``--batch``. A row that is done is kept in the output; one that was stopped, with Ctrl-C too, goes on with the same
command. ``--minutes`` ends a call when a row begins or is under way after so long.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import describe_run
from fpn_engine.cli.stopping import StopRequest
from fpn_engine.files import replacing
from fpn_engine.masks.ground_truth import load_segments
from fpn_engine.masks.spec import MaskSpec
from fpn_export.masks.checkpoint import load_mask_model
from fpn_export.masks.examples import AnnotatedSegments, SceneExamples
from fpn_export.masks.training import MaskJob, SegmentValidation, make_recipe, train_masks
from fpn_export.masks.variants import make_variant
from fpn_export.scenes.dataset import ANNOTATIONS, IMAGES, write_coco
from fpn_export.training.trainer import Habits, Progress

# Row: variant, and how many times the schedule.
ROWS = {
    "5x5": ("5x5", 1),
    "7x7": ("7x7", 1),
    "dual": ("dual", 1),
    "dual, 2x masks": ("dual-2x", 1),
    "dual, 2x masks, 2x schedule": ("dual-2x", 2),
}
SIZE = (240, 320)  # of scenes, whose objects are 8 to 200 pixels large then: so the finest level is for 16, not 32
BASE = MaskSpec(
    arch="resnet18",
    body_width=24,
    fpn_channels=64,
    hidden_channels=192,
    canonical_size=16,
    min_size=SIZE[0],
    max_size=SIZE[1],
)
TRAIN_SEED, VALIDATION_SEED = 1, 1_000_001


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large an experiment is: updates of a plain row, images per update, scenes to learn and to score."""

    steps: int
    batch: int
    scenes: int
    val_scenes: int

    def describe(self) -> dict[str, Any]:
        names = ("steps", "batch", "scenes", "val_scenes")
        return {name: getattr(self, name) for name in names} | {"size": SIZE, "spec": BASE.to_dict()}


def run_row(name: str, scale: Scale, folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Train and score a row; None if it was stopped."""
    variant, factor = ROWS[name]
    data = folder / "scenes"
    if not (data / ANNOTATIONS).exists():
        print(f"drawing {scale.scenes} scenes", file=sys.stderr, flush=True)
        write_coco(data, TRAIN_SEED, scale.scenes, SIZE)
    steps, output = factor * scale.steps, folder / name.replace(", ", "-").replace(" ", "-")
    job = MaskJob(
        spec=make_variant(BASE, variant),
        recipe=make_recipe(steps, scale.batch, warmup_steps=min(100, steps // 4), clip_norm=5.0),
        output=output,
        examples=AnnotatedSegments(load_segments(data / ANNOTATIONS), data / IMAGES),
        data={"scenes": scale.scenes, "seed": TRAIN_SEED},
        habits=Habits(save_every=50),
        device="cpu",
    )
    if not train_masks(job, _make_printer(name), should_stop).complete:
        return None
    others = SceneExamples(VALIDATION_SEED, scale.val_scenes, SIZE)
    validation = SegmentValidation(others.truth, lambda number: others[number].pixels)
    score = validation(load_mask_model(output / "last.pth"))
    return {"row": name, "variant": variant, "steps": steps, "seconds": _training_seconds(output), **score.to_dict()}


def _make_printer(name: str) -> Callable[[Progress], None]:
    """Progress on stderr, a line for every 25 updates."""

    def show(progress: Progress) -> None:
        if progress.step % 25 == 0 or progress.step == progress.steps:
            losses = "  ".join(f"{key} {value:.3f}" for key, value in progress.losses.items())
            line = f"{name}: {progress.step}/{progress.steps}  {losses}  {progress.seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)

    return show


def _training_seconds(output: Path) -> int:
    """Of all runs, by the log: a row may be trained by one call and scored by another."""
    with (output / "log.csv").open(newline="") as file:
        return round(float(list(csv.DictReader(file))[-1]["seconds"]))


def run_table(scale: Scale, folder: Path, output: Path, should_stop: Callable[[], bool], command: str) -> bool:
    """Every row that ``output`` has not; returns whether all are there.

    Raises: SystemExit if ``output`` is of another scale.
    """
    rows: list[dict[str, Any]] = json.loads(output.read_text()) if output.exists() else []
    if any(row["scale"] != json.loads(json.dumps(scale.describe())) for row in rows):
        raise SystemExit(f"{output} is of another scale; name another output")
    done = {row["row"] for row in rows}
    for name in ROWS:
        if name in done:
            continue
        row = None if should_stop() else run_row(name, scale, folder, should_stop)
        if row is None:
            return False
        rows.append({**describe_run(command), "scale": scale.describe(), **row})
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Returns: 0 if all rows are there, 75 (try again) if some are not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_table6", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="scenes and runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/masks_table6.json"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--val-scenes", type=int, default=100)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after so many; the same command goes on"
    )
    given = parser.parse_args(arguments)
    scale = Scale(steps=given.steps, batch=given.batch, scenes=given.scenes, val_scenes=given.val_scenes)
    size = f"--steps {given.steps} --batch {given.batch} --scenes {given.scenes} --val-scenes {given.val_scenes}"
    begin, stop = time.monotonic(), StopRequest()

    def should_stop() -> bool:
        return stop() or time.monotonic() - begin > 60 * given.minutes

    with stop:
        command = f"python -m benchmarks.mask_table6 {given.folder.name} {size}"
        complete = run_table(scale, given.folder, given.output, should_stop, command)
    return 0 if complete else 75


if __name__ == "__main__":
    sys.exit(main())
