"""What each precision finds and takes: the COCO AP on real photographs beside the time of an image.

    python -m benchmarks.bench_precision -o FILE
    pytest benchmarks/bench_precision.py

A Faster R-CNN R18-FPN that torchvision trained on photographs of blood cells, its 72 test photographs, all backends and
precisions that run on this CPU, in turns on each photograph. Needs $FPN_ENGINE_SHARED or ../shared with the data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.ours import FORMS, build_for_cpu, why_not
from benchmarks.rows import Row
from benchmarks.suite import Case, Effort, Measured, NotHereError, RunCase, Suite, run_suite
from fpn_engine.annotations import CocoGroundTruth, load_annotations
from fpn_engine.engine import Engine
from fpn_engine.errors import FpnEngineError
from fpn_engine.ruler import WALL, Times, Turn, take_turns
from fpn_export.checkpoint import load_checkpoint
from tests.parity.subject import Subject
from tests.parity.test_photographs import score
from tests.parity.torchvision_oracle import Found, Pixels

SHARED = Path(os.environ.get("FPN_ENGINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
BASE = "fpn-engine, onnxruntime fp32"
QUICK_IMAGES, QUICK_FORMS = 3, 2
CALIBRATING = 32  # photographs of another split
WHAT = "R18-FPN on photographs of blood cells"


def list_cases(effort: Effort) -> list[Case]:
    missing = "" if (SHARED / "data" / "bccd").is_dir() else "the photographs are not here; set FPN_ENGINE_SHARED"
    return [Case(what=WHAT, measure=measure, why_not=missing)]


def measure(effort: Effort) -> Iterator[Measured]:
    if effort.device.type == "cuda":
        raise NotHereError("measures the backends of the CPU; pytest -m gpu tests/parity has the GPU's AP")
    checkpoint = load_checkpoint(SHARED / "checkpoints" / "bccd_r18_fpn.pth")
    subject = Subject(checkpoint.spec, checkpoint.model, checkpoint.shape.representation_size)
    folder = SHARED / "data" / "bccd"
    truth, calibrating = (load_annotations(folder / f"instances_{split}.json") for split in ("test", "val"))
    images = read_images(truth, folder / "images", QUICK_IMAGES if effort.quick else len(truth.images))
    photographs = [folder / "images" / each.file_name for each in calibrating.images[:CALIBRATING]]
    engines, about = load_engines(subject, photographs, FORMS["cpu"][: QUICK_FORMS if effort.quick else None])
    found, times = detect_in_turns(engines, images)
    scores = {name: score(found[name], subject, truth).AP for name in engines}
    for name in engines:
        about[name] = {
            "precision": name.rpartition(" ")[2],
            "AP": round(scores[name], 4),
            "AP_difference": round(scores[name] - scores[BASE], 4),
            "milliseconds": times.spread(name).to_dict(),
            "ratio_to_fp32": times.ratio(name, BASE),
        }
    yield Measured.of({"contestants": about, "images": len(images), "complete": True}, times)


def read_images(truth: CocoGroundTruth, folder: Path, count: int) -> dict[int, Pixels]:
    return {each.id: np.array(Image.open(folder / each.file_name).convert("RGB")) for each in truth.images[:count]}


def load_engines(
    subject: Subject, photographs: Sequence[Path], forms: Sequence[tuple[str, str]]
) -> tuple[dict[str, Engine], dict[str, Row]]:
    """Those that can be had, and why the others cannot."""
    engines: dict[str, Engine] = {}
    about: dict[str, Row] = {}
    for backend, precision in forms:
        name = f"fpn-engine, {backend} {precision}"
        if reason := why_not("cpu", backend, precision):
            about[name] = {"not_run": reason}
            continue
        try:
            engines[name] = Engine.from_plan(build_for_cpu(subject, backend, precision, photographs))
        except FpnEngineError as error:
            about[name] = {"not_run": str(error)}
    return engines, about


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
