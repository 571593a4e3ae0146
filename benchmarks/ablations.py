"""Table 1 of Lin et al. 2017 on generated scenes: what top-down pathway, lateral connections and pyramid bring the RPN.

    python -m benchmarks.ablations --work FOLDER -o benchmarks/results/ablations.json

Draws scenes into FOLDER, trains an RPN of each system there under one recipe and scores its proposals on scenes that
no training saw. A system that is in the output file is not trained again and a run that was stopped goes on, so the
command may be repeated until all are there. ``--init`` takes a bottom-up network that has learned to tell objects apart
(``benchmarks.pretrain_body``), and fixes of it what the paper's code fixes of ImageNet's. ``--candidates`` scores with
another number of candidates before NMS, on each level.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import describe_run
from fpn_engine.annotations import load_annotations
from fpn_engine.engine import Engine
from fpn_engine.evaluation import score_proposals
from fpn_engine.files import replacing
from fpn_engine.spec import ModelSpec
from fpn_export.checkpoint import load_checkpoint
from fpn_export.scenes import CATEGORIES
from fpn_export.scenes.dataset import ANNOTATIONS, IMAGES, write_coco
from fpn_export.systems import SYSTEMS, make_system
from fpn_export.training.job import Job, train
from fpn_export.training.recipe import Recipe
from fpn_export.training.trainer import Habits, Progress
from fpn_export.training.validation import propose

TABLE_1 = ("c4", "c5", "fpn", "bottom_up", "top_down", "finest")
TRAIN_SEED, TEST_SEED = 101, 102
# Half the widths of a ResNet-18 and small images: a run is to take at most 20 minutes on two cores. Anchors are four
# strides wide (the paper's are eight): of two strides, too few large objects lie on one.
BASE = ModelSpec(
    categories=CATEGORIES,
    arch="resnet18",
    body_width=32,
    fpn_channels=64,
    min_size=384,
    max_size=512,
    anchor_sizes=((16.0,), (32.0,), (64.0,), (128.0,), (256.0,)),
)


def make_recipe(steps: int, seed: int, pretrained: bool) -> Recipe:
    """The paper's RPN recipe for a small batch; if pretrained with batch norms, stem and first stage fixed."""
    return Recipe(
        steps=steps,
        batch_size=4,
        learning_rate=0.02,
        schedule="cosine",
        warmup_steps=200,
        nesterov=True,
        clip_norm=5.0,
        precision="bf16",
        freeze_norm=pretrained,
        frozen_stages=2 if pretrained else 0,
        seed=seed,
    )


def draw(folder: Path, seed: int, count: int) -> Path:
    """The annotation file of ``count`` scenes in ``folder``, drawn unless they are there."""
    path = folder / ANNOTATIONS
    return path if path.exists() else write_coco(folder, seed, count)


def measure(
    system: str, seed: int, steps: int, init: Path | None, candidates: int, work: Path, data: Path, test: Path
) -> dict[str, Any]:
    """Train one RPN, or go on, and score its proposals."""
    spec = make_system(BASE, system, "rpn")
    job = Job(
        annotations=[data],
        images=[data.parent / IMAGES],
        output=work / f"{system}-{seed}{'-pretrained' if init else ''}",
        spec=spec,
        recipe=make_recipe(steps, seed, init is not None),
        init=init,
        habits=Habits(save_every=100),
    )

    def report(progress: Progress) -> None:
        if progress.step % 100 == 0:
            print(f"{system}: step {progress.step}, loss {progress.losses['loss']:.3f}", file=sys.stderr, flush=True)

    train(job, report)
    model = load_checkpoint(job.output / "last.pth").model
    model.spec = dataclasses.replace(model.spec, rpn_pre_nms_top_n_test=candidates)
    truth = load_annotations(test)
    began = time.perf_counter()
    proposed = propose(Engine(model.pipeline), truth, test.parent / IMAGES)
    score = score_proposals(truth, {image.id: proposals for image, proposals in proposed})
    return {
        "what": f"RPN, {system}, {SYSTEMS[system].summary}",
        "paper": SYSTEMS[system].rows,
        "system": system,
        "seed": seed,
        "steps": steps,
        "init": None if init is None else hashlib.sha256(init.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "anchors": count_anchors(spec),
        "candidates": candidates,
        **{name: None if value is None else round(value, 4) for name, value in score.to_dict().items()},
        "training_minutes": json.loads((job.output / "last.json").read_text())["about"]["minutes"],
        "test_images": len(truth.images),
        "test_minutes": round((time.perf_counter() - began) / 60, 1),
    }


def count_anchors(spec: ModelSpec) -> int:
    """Of one image."""
    height, width = spec.min_size, spec.max_size  # of a scene, and whole cells of each level
    return sum((height >> level) * (width >> level) for level in spec.levels) * spec.num_anchors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for scenes and runs")
    parser.add_argument("--systems", nargs="+", default=TABLE_1, choices=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--test-scenes", type=int, default=200)
    parser.add_argument("--init", type=Path, help="a classifier for the bottom-up network (default: from scratch)")
    parser.add_argument(
        "--candidates", type=int, help="of a level before NMS (default: 1000, on one map as many as on all)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    data = draw(given.work / "train", TRAIN_SEED, given.scenes)
    test = draw(given.work / "test", TEST_SEED, given.test_scenes)
    rows = json.loads(given.output.read_text()) if given.output.exists() else []
    done = {(row["system"], row["seed"], row["steps"], bool(row["init"]), row["candidates"]) for row in rows}
    options = ["--steps", str(given.steps), "--scenes", str(given.scenes), "--test-scenes", str(given.test_scenes)]
    if given.init:
        options += ["--init", "FOLDER/classifier.pth"]
    if given.candidates:
        options += ["--candidates", str(given.candidates)]
    command = shlex.join(["python", "-m", "benchmarks.ablations", "--work", "FOLDER", *options])
    for seed in given.seeds:
        for system in given.systems:
            candidates = given.candidates or make_system(BASE, system, "rpn").rpn_pre_nms_top_n_test
            if (system, seed, given.steps, given.init is not None, candidates) not in done:
                row = measure(system, seed, given.steps, given.init, candidates, given.work, data, test)
                rows.append({**row, **describe_run(command)})
                with replacing(given.output) as temporary:
                    temporary.write_text(json.dumps(rows, indent=1) + "\n")
                json.dump(row, sys.stdout, indent=1)
                print()


if __name__ == "__main__":
    main()
