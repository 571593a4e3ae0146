"""int8 beside fp32 on a CPU: AP on the blood cells, file sizes, and the time of R50 at 800x1216.

    python -m benchmarks.quantization CHECKPOINT DATA -o benchmarks/results/quantization.json

DATA is the folder with instances_train.json, instances_test.json and images/. int8 is calibrated on train, with every
way of finding ranges, and scored on test; the file of the default is scored as a native plan too. The R50 has random
weights; plans of both backends take turns on the same images, and a second clock counts the processor's time, which
other programs on the machine stretch less. Where these have the cores, threads wait for each other, most of all those
of torch: ``time_one_thread`` is without. ``--only`` takes one measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from PIL import Image

from benchmarks.provenance import describe_run
from fpn_engine.annotations import load_annotations
from fpn_engine.engine import Engine
from fpn_engine.plan import Plan, read_plan
from fpn_engine.ruler import Times, Turn, take_turns
from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.build import build_plan
from fpn_export.checkpoint import load_checkpoint
from fpn_export.onnx_export import export_onnx
from fpn_export.quantization.calibration import calibrate
from fpn_export.quantization.layers import Network
from fpn_export.quantization.pairs import insert_pairs
from fpn_export.quantization.quantize import QuantizeOptions, split_images
from fpn_export.quantization.ranges import RANGES
from fpn_export.quantization.scoring import detect, score_agreement, score_ap
from tests.parity.random_detector import make_picture
from tests.parity.subject import random_subject

SIZE, ROUNDS, CALIBRATE = (800, 1216), 7, 64
RATIOS = (
    ("onnxruntime int8", "onnxruntime fp32"),
    ("native int8", "native fp32"),
    ("native int8", "onnxruntime int8"),
)
Row = dict[str, Any]


def measure_ap(checkpoint: Path, data: Path) -> Row:
    """AP of fp32 and of each int8 on the test split."""
    loaded = load_checkpoint(checkpoint)
    model, spec = export_onnx(loaded.model, loaded.spec), loaded.spec
    train, test = (load_annotations(data / f"instances_{split}.json") for split in ("train", "test"))
    every = Network(model).layers
    calibrating, _ = split_images([data / "images" / image.file_name for image in train.images], CALIBRATE, 1)
    seen = calibrate(model, spec, every, calibrating)
    paths = [data / "images" / image.file_name for image in test.images]

    def find(each: ModelProto) -> Any:
        return detect(each, spec, paths, lambda: None, lambda line: None)

    exact = find(model)
    base = score_ap(exact, test)
    rows: dict[str, Row] = {}
    size = 0

    def describe(found: Any) -> Row:
        ap = score_ap(found, test)
        return {
            "AP": round(ap, 4),
            "AP_points_against_fp32": round(100 * (ap - base), 2),
            "agreement": round(score_agreement(found, exact), 4),
        }

    native: Row = {}
    for name, find_range in RANGES.items():
        ranges = {value: find_range(histogram, "int8") for value, histogram in seen.histograms.items()}
        made = insert_pairs(model, {layer.name for layer in every}, ranges)
        size = made.ByteSize()
        rows[name] = describe(find(made))
        if name == QuantizeOptions().ranges:
            with tempfile.TemporaryDirectory() as folder:
                engine = _load(_build(made, Path(folder), "native"))
            native = describe({str(path): engine(path)[0] for path in paths})
    return {
        "what": "blood-cell test split, R18-FPN, all layers int8 but the last; by range ONNX Runtime on the CPU",
        "calibrated_on": len(calibrating),
        "scored_on": len(paths),
        "AP_fp32": round(base, 4),
        "ranges": rows,
        "native": native,
        "file_bytes_fp32": model.ByteSize(),
        "file_bytes_int8": size,
        "file_ratio": round(size / model.ByteSize(), 3),
    }


def measure_time(threads: int | None = None) -> Row:
    """Plans of an R50 from uint8 image to detections, in turns; None is a thread for each core."""
    if threads:
        torch.set_num_threads(threads)
    small = ModelSpec(categories=numbered_categories(90), min_size=160, max_size=256)
    subject = random_subject("resnet50", small, representation_size=1024)
    model = subject.onnx_model
    every = Network(model).layers
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{seed}.png" for seed in range(4)]
        for seed, path in enumerate(paths):
            Image.fromarray(make_picture(160, 243, seed)).save(path)
        seen = calibrate(model, subject.spec, every, paths)
        ranges = {name: RANGES["percentile"](histogram, "int8") for name, histogram in seen.histograms.items()}
        made = insert_pairs(model, {layer.name for layer in every}, ranges)
        plans = {
            f"{backend} {precision}": _build(each, Path(folder), backend)
            for precision, each in (("fp32", model), ("int8", made))
            for backend in ("onnxruntime", "native")
        }
    # The weights were made on small pictures; the parts take any size.
    clocked = {name: Clocked(_load(plan, threads, min_size=800, max_size=1333)) for name, plan in plans.items()}
    wall = take_turns({name: each.turn for name, each in clocked.items()}, "cpu", rounds=ROUNDS)
    processor = Times({name: each.seconds[-ROUNDS:] for name, each in clocked.items()})
    assert all(each.found for each in clocked.values()), "there is nothing to detect"
    return {
        "what": "R50-FPN, 800x1216, batch 1, 91 classes, random weights, uint8 array to detections",
        "milliseconds": {name: wall.spread(name).to_dict() for name in clocked},
        "processor_milliseconds": {name: processor.spread(name).to_dict() for name in clocked},
        "median_ratio": {f"{name} to {other}": wall.ratio(name, other) for name, other in RATIOS},
        "median_ratio_processor": {f"{name} to {other}": processor.ratio(name, other) for name, other in RATIOS},
        "file_ratio": round(made.ByteSize() / model.ByteSize(), 3),
    }


class Clocked:
    """An engine's turns on pictures by round; ``seconds`` are the processor's of each, all threads together."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._image = engine, make_picture(*SIZE)
        self.seconds: list[float] = []
        self.found = 0
        self.turn = Turn("wall", self._load, self._run)

    def _load(self, number: int) -> None:
        self._image = make_picture(*SIZE, number)

    def _run(self) -> None:
        start = time.process_time()
        (found,) = self._engine(self._image)
        self.seconds.append(time.process_time() - start)
        self.found += len(found)


def _build(model: ModelProto, folder: Path, backend: str) -> Plan:
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    return read_plan(build_plan(path, path.with_suffix(".plan"), backend=backend, force=True).path)


def _load(plan: Plan, threads: int | None = None, **changes: Any) -> Engine:
    """The plan with fields of its spec changed."""
    spec = dataclasses.replace(plan.manifest.spec, **changes)
    return Engine.from_plan(Plan(dataclasses.replace(plan.manifest, spec=spec), plan.parts), threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", choices=("ap", "time", "time_one_thread"))
    given = parser.parse_args()
    command = ["python", "-m", "benchmarks.quantization", given.checkpoint.name, f"{given.data.name}/"]
    rows = json.loads(given.output.read_text()) if given.output.exists() else []
    measures: dict[str, Callable[[], Row]] = {
        "ap": lambda: measure_ap(given.checkpoint, given.data),
        "time": measure_time,
        "time_one_thread": lambda: measure_time(1),
    }
    for name, measure in measures.items():
        if given.only in (None, name):
            row = {"name": name, **measure(), **describe_run(shlex.join([*command, "--only", name]))}
            rows = [other for other in rows if other["name"] != name] + [row]
            given.output.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
