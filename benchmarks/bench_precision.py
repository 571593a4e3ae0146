"""What each precision finds and takes: the COCO AP on real photographs beside the time of an image.

    python -m benchmarks.bench_precision -o FILE
    pytest benchmarks/bench_precision.py

A Faster R-CNN R18-FPN that torchvision trained on photographs of blood cells, its 72 test photographs, all backends and
precisions that run on the GPU, or on this CPU without one, in turns on each photograph; beside ONNX Runtime in float32
on the CPU. Needs $FPN_ENGINE_SHARED or ../shared with the data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.ours import FORMS, build_for_cpu, why_not
from benchmarks.plans import build
from benchmarks.rows import Row
from benchmarks.suite import Case, Effort, Measured, NotHereError, RunCase, Suite, run_suite
from fpn_engine.annotations import CocoGroundTruth, load_annotations
from fpn_engine.engine import Engine
from fpn_engine.errors import FpnEngineError
from fpn_engine.ruler import WALL, Times, Turn, take_turns
from fpn_export.checkpoint import load_checkpoint
from fpn_export.native.tactics import TuneFor
from tests.parity.subject import Subject
from tests.parity.test_native import SURE, find_lost
from tests.parity.test_photographs import score
from tests.parity.torchvision_oracle import Found, Pixels

SHARED = Path(os.environ.get("FPN_ENGINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
BASE, ON_CPU = "fpn-engine, onnxruntime fp32", ", on the CPU"
CUDA_SIZE, CUDA_SECONDS = (256, 320), 20.0  # to tune for, and how long
QUICK_IMAGES, QUICK_FORMS = 3, 2
CALIBRATING = 32  # photographs of another split
WHAT = "R18-FPN on photographs of blood cells"


def list_cases(effort: Effort) -> list[Case]:
    missing = "" if (SHARED / "data" / "bccd").is_dir() else "the photographs are not here; set FPN_ENGINE_SHARED"
    return [Case(what=WHAT, measure=measure, why_not=missing)]


def measure(effort: Effort) -> Iterator[Measured]:
    kind = effort.device.type
    checkpoint = load_checkpoint(SHARED / "checkpoints" / "bccd_r18_fpn.pth")
    subject = Subject(checkpoint.spec, checkpoint.model, checkpoint.shape.representation_size)
    folder = SHARED / "data" / "bccd"
    truth, calibrating = (load_annotations(folder / f"instances_{split}.json") for split in ("test", "val"))
    images = read_images(truth, folder / "images", QUICK_IMAGES if effort.quick else len(truth.images))
    photographs = [folder / "images" / each.file_name for each in calibrating.images[:CALIBRATING]]
    forms = FORMS[kind][: QUICK_FORMS if effort.quick else None]
    base, (engines, about) = name_base(kind), load_engines(subject, photographs, kind, forms)
    found, times = detect_in_turns(engines, images)
    scores = {name: score(found[name], subject, truth).AP for name in engines}
    for name in engines:
        about[name] = {
            "precision": name.removesuffix(ON_CPU).rpartition(" ")[2],
            "AP": round(scores[name], 4),
            "AP_difference": round(scores[name] - scores[base], 4),
            "sure_detections_without_twin": sum(len(find_lost(found[name][i], found[base][i])) for i in images),
            "milliseconds": times.spread(name).to_dict(),
            "ratio_to_fp32": times.ratio(name, base),
        }
    sure = sum(int((each.scores >= SURE).sum()) for each in found[base].values())
    yield Measured.of({"contestants": about, "images": len(images), "sure_detections": sure, "complete": True}, times)


def name_base(kind: str) -> str:
    """What the others are compared with: on a GPU it runs on the CPU beside it."""
    return BASE + (ON_CPU if kind == "cuda" else "")


def read_images(truth: CocoGroundTruth, folder: Path, count: int) -> dict[int, Pixels]:
    return {each.id: np.array(Image.open(folder / each.file_name).convert("RGB")) for each in truth.images[:count]}


def load_engines(
    subject: Subject, photographs: Sequence[Path], kind: str, forms: Sequence[tuple[str, str]]
) -> tuple[dict[str, Engine], dict[str, Row]]:
    """Those that can be had, and why the others cannot."""
    engines: dict[str, Engine] = {name_base(kind): Engine.from_plan(subject.plan)} if kind == "cuda" else {}
    about: dict[str, Row] = {}
    for backend, precision in forms:
        name = f"fpn-engine, {backend} {precision}"
        try:
            engines[name] = load_engine(subject, photographs, kind, backend, precision)
        except (FpnEngineError, NotHereError) as error:
            about[name] = {"not_run": str(error)}
    return engines, about


def load_engine(subject: Subject, photographs: Sequence[Path], kind: str, backend: str, precision: str) -> Engine:
    """Raises: NotHereError, FpnEngineError with the reason if it cannot be had."""
    if reason := why_not(kind, backend, precision):
        raise NotHereError(reason)
    if kind == "cpu":
        return Engine.from_plan(build_for_cpu(subject, backend, precision, photographs))
    tune_for = TuneFor(shapes=((1, *CUDA_SIZE),), seconds=CUDA_SECONDS)
    return Engine.from_plan(build(subject, precision, backend, tune_for, photographs))


def detect_in_turns(engines: dict[str, Engine], images: dict[int, Pixels]) -> tuple[dict[str, dict[int, Found]], Times]:
    """Every image is a round, which all engines detect in."""
    found: dict[str, dict[int, Found]] = {name: {} for name in engines}
    ids, at = list(images), [0]

    def load(number: int) -> None:
        at[0] = ids[number % len(ids)]

    def turn_of(name: str, engine: Engine) -> Turn:
        def run() -> None:
            found[name][at[0]] = Found.of(engine(images[at[0]])[0])

        return Turn(WALL, load, run)

    turns = {name: turn_of(name, engine) for name, engine in engines.items()}
    return found, take_turns(turns, "cpu", rounds=len(ids))


SUITE = Suite(name="precision", summary="AP and time of each precision on photographs", list_cases=list_cases)


def test_precision(case: Case, run_case: RunCase) -> None:
    run_case(case)


if __name__ == "__main__":
    sys.exit(run_suite(SUITE, sys.argv[1:]))
