"""Whole detectors against torchvision on a GPU: uint8 images in device memory to detections, and stage by stage.

    python -m benchmarks.end_to_end -o benchmarks/results/end_to_end.json --minutes 8

Faster R-CNN with FPN, 91 classes, random calibrated weights, 800x1216. All contestants of a row have the same weights,
are checked against torchvision in float32 without TF32, and take turns on the same images; one that fails has its error
in the row instead. A row is saved after each group of contestants and not taken again once it is complete; where one
breaks the device, the command goes on without it in a new process. ``--smoke`` runs all this on the CPU, on a small
model: a test of itself, no measurement.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.detector_stages import count_floors, measure_stages
from benchmarks.detectors import (
    BASE,
    COMPILED,
    Contestant,
    Scene,
    check,
    list_contestants,
    load_eager_parts,
    load_native_parts,
)
from benchmarks.provenance import describe_run
from benchmarks.timing import take_turns
from fpn_engine.files import replacing
from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.onnx_cost import HEAD
from tests.parity.subject import random_subject

COMMAND = "python -m benchmarks.end_to_end"
SIZE, SMOKE_SIZE = (800, 1216), (160, 224)
FULL, FEW = 60, 10  # rounds: of all contestants, and of those that are there while others are prepared
SECONDS = 60.0  # for the rounds of a row, at least ten rounds in any case
STAGED = (1, 2, 8)  # batches whose stages are measured
ERROR_LENGTH = 300
LEFT_OUT = "left out"
# On an H200 (the project's own): milliseconds an image at batch 1, images a second above.
IMAGES = {"first": 700.0, "good": 1000.0, "extreme": 1200.0}
TARGETS: dict[tuple[str, int], tuple[str, dict[str, float]]] = {
    ("resnet50", 1): ("ms", {"first": 2.5, "good": 1.4, "extreme": 1.2}),
    ("resnet50", 16): ("images_per_s", IMAGES),
    ("resnet101", 1): ("ms", {"first": 3.3, "good": 1.9, "extreme": 1.6}),
    ("resnet50", 32): ("images_per_s", IMAGES),
}
Row = dict[str, Any]


class DeviceLostError(Exception):
    """The device does not answer any more; the arguments are the contestants that it can have been."""


def make_rows(
    scene: Scene, *, rounds: int | None, left_out: Sequence[str], compiled: str, is_over: Callable[[], bool]
) -> Iterator[Row]:
    """One row that grows, group after group of contestants; ``complete`` once all have had their turn.

    Raises: DeviceLostError after the row, which is complete then: another try would end the same way.
    """
    ready: dict[str, Contestant] = {}
    about: dict[str, Row] = {}
    groups = list_contestants(scene.device, compiled)
    assert all(len(found.scores) for found in scene.expected.values()), "there is nothing to compare"
    for number, group in enumerate(groups):
        is_last = number == len(groups) - 1
        if number and is_over():
            return
        for name, make in group.items():
            if name in left_out:
                about[name] = {"error": LEFT_OUT}
                continue
            try:
                ready[name], about[name] = set_up(scene, make)
            except Exception as error:  # of one contestant; the others can still be measured
                traceback.print_exc()
                about[name] = {"error": describe_error(error)}
                if not is_device_alive(scene.device):
                    yield {"contestants": about, "complete": False}
                    raise DeviceLostError(name) from None
        turns = {name: contestant.turn for name, contestant in ready.items()}
        few = rounds if is_last or rounds else FEW
        try:
            times = take_turns(turns, scene.device.type, rounds=few or FULL, seconds=SECONDS)
        except Exception as error:
            if is_device_alive(scene.device):
                raise
            raise DeviceLostError(*group) from error  # the groups before were timed
        for name, spent in times.items():
            about[name] |= spent
        yield {"contestants": compare(about, scene.batch), "complete": is_last}


def set_up(scene: Scene, make: Callable[[Scene], Contestant]) -> tuple[Contestant, Row]:
    """A contestant that is right, and what it found and needed."""
    before = 0
    if scene.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    contestant = make(scene)
    row: Row = {"agreement": check(scene, contestant)}
    if scene.device.type == "cuda":
        torch.cuda.synchronize()
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - before
    return contestant, row


def compare(about: dict[str, Row], batch: int) -> dict[str, Row]:
    """Throughput, and the ratios to torchvision in float32 and to its fastest form, added to each that was timed."""
    times = {name: row["median_us"] for name, row in about.items() if "median_us" in row}
    best = min((spent for name, spent in times.items() if name.startswith("torchvision")), default=None)
    for name, spent in times.items():
        about[name]["images_per_s"] = round(batch / spent * 1e6, 1)
        for key, other in (("ratio_to_torchvision_fp32", times.get(BASE)), ("ratio_to_fastest_torchvision", best)):
            if other is not None:
                about[name][key] = round(spent / other, 3)
    return about


def describe_error(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:ERROR_LENGTH]}"


def is_device_alive(device: torch.device) -> bool:
    """After an illegal access nothing works until the process ends."""
    try:
        return float(torch.ones(8, device=device).sum()) == 8.0
    except RuntimeError:
        return False


def make_stage_row(scene: Scene, rounds: int | None) -> Row:
    """The stages of the native plan, or of PyTorch's own parts where that fails."""
    half, precision = (torch.float16, "fp16") if scene.device.type == "cuda" else (torch.float32, "fp32")
    row: Row = {"parts": f"native {precision}"}
    try:
        trunk, head = load_native_parts(scene, precision)
        assert head is not None
        stages = measure_stages(scene, trunk, head, rounds)
    except Exception as error:
        traceback.print_exc()
        row |= {"parts": f"PyTorch's {precision}", "error_of_native": describe_error(error)}
        stages = measure_stages(scene, *load_eager_parts(scene, half), rounds)
    floors = count_floors(scene, half.itemsize)
    for name in stages.keys() & floors.keys():
        stages[name]["floor_us"] = floors[name]
    sum_us = round(sum(spent["median_us"] for spent in stages.values()), 1)
    return row | {"stages": stages, "sum_us": sum_us, "floors_us": floors, "complete": True}


@lru_cache(maxsize=1)
def make_scene(arch: str, batch: int, tuning_seconds: float, smoke: bool) -> Scene:
    """As large as the COCO model; calibrated on small pictures, run at full size."""
    if smoke:
        return Scene(random_subject(arch), SMOKE_SIZE, batch, torch.device("cpu"))
    small = ModelSpec(categories=numbered_categories(90), min_size=160, max_size=256)
    subject = random_subject(arch, small, representation_size=1024)
    return Scene(subject, SIZE, batch, torch.device("cuda", torch.cuda.current_device()), tuning_seconds)


def list_work(archs: Sequence[str], batches: Sequence[int], size: tuple[int, int]) -> list[tuple[str, str, int, str]]:
    """Kind, architecture, batch and name of each row, those with a target first."""
    order = list(TARGETS)
    pairs = sorted(itertools.product(archs, batches), key=lambda p: order.index(p) if p in order else len(order))
    work = []
    for arch, batch in pairs:
        what = f"{arch}-FPN, {size[0]}x{size[1]}, batch {batch}"
        work.append(("end_to_end", arch, batch, f"{what}, uint8 images in device memory to detections"))
        if batch in STAGED:
            work.append(("stages", arch, batch, f"{what}, stage by stage"))
    return work


def describe_scene(scene: Scene, arch: str) -> Row:
    """What the figures of a row are to be read beside."""
    floors = count_floors(scene, 2)
    row: Row = {"arch": arch, "batch": scene.batch, "size": list(scene.size), "classes": scene.spec.num_classes}
    row |= {"weights": "random", "tf32": False, "floor_us": round(floors["trunk"] + floors[HEAD], 1)}
    if (arch, scene.batch) in TARGETS and scene.size == SIZE:
        unit, targets = TARGETS[arch, scene.batch]
        row["targets_on_an_H200"] = {"unit": unit, **targets}
    return row


def save(path: Path, rows: Sequence[Row]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")


def show(row: Row) -> None:
    print(row["what"], "" if row["complete"] else "(so far)")
    for name, spent in (row.get("contestants") or row["stages"]).items():
        figures = [f"{spent['median_us'] / 1e3:9.3f} ms"] if "median_us" in spent else [spent["error"]]
        for key in ("images_per_s", "ratio_to_fastest_torchvision", "floor_us"):
            figures += [f"{key} {spent[key]}"] if key in spent else []
        print(f"  {name:70} {', '.join(figures)}", flush=True)


def go_on(argv: Sequence[str], minutes: float, names: Sequence[str]) -> list[str]:
    """The command that takes what is left, without the contestants that may have broken the device."""
    left_out = [word for name in names for word in ("--leave-out", name)]
    return [sys.executable, "-m", "benchmarks.end_to_end", *argv, "--minutes", f"{minutes:.2f}", *left_out]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON, added to")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further row is begun")
    parser.add_argument("--archs", nargs="+", default=["resnet50", "resnet101"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--tuning-seconds", type=float, default=30.0, help="for each native plan that is built")
    parser.add_argument("--compiled", choices=COMPILED, default=COMPILED[0], help="whole: in parts, and whole too")
    parser.add_argument("--leave-out", action="append", default=[], metavar="NAME", help="a contestant")
    parser.add_argument("--smoke", action="store_true", help="a small model on the CPU, two rounds")
    given = parser.parse_args(argv)
    if given.smoke:
        given.archs, given.batches = ["resnet18"], [2]
    elif not torch.cuda.is_available():
        parser.exit(1, "there is no CUDA device here; --smoke tries the code on the CPU\n")
    return given


def main(argv: Sequence[str]) -> int:
    given, begin = parse(argv), time.monotonic()
    device, size = torch.device("cpu" if given.smoke else "cuda"), SMOKE_SIZE if given.smoke else SIZE
    rounds = 2 if given.smoke else None
    if device.type == "cuda":  # each as fast as it can be at fixed shapes, and float32 as float32
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def is_over() -> bool:
        return time.monotonic() - begin > 60 * given.minutes

    run = describe_run(f"{COMMAND} {' '.join(argv)}")
    rows: list[Row] = json.loads(given.output.read_text()) if given.output.exists() else []
    failed = []
    for kind, arch, batch, what in list_work(given.archs, given.batches, size):
        key = {"what": what, "device": run["device"], "commit": run["commit"]}
        if any(row["complete"] and key.items() <= row.items() for row in rows):
            continue
        if is_over():
            print(f"out of time before {what}; the same command goes on", file=sys.stderr)
            break
        others = [row for row in rows if not key.items() <= row.items()]
        row: Row = {}
        try:
            scene = make_scene(arch, batch, given.tuning_seconds, given.smoke)
            about = {"what": what, **describe_scene(scene, arch)}
            if kind == "stages":
                grown = iter([make_stage_row(scene, rounds)])
            else:
                options = {"left_out": given.leave_out, "compiled": given.compiled, "is_over": is_over}
                grown = make_rows(scene, rounds=rounds, **options)
            for part in grown:
                row = {**about, **part, **run}
                rows = [*others, row]
                save(given.output, rows)
                show(row)
        except Exception as error:  # of one row; the others can still be taken
            traceback.print_exc()
            failed.append(what)
            if not is_device_alive(device):
                names = error.args if isinstance(error, DeviceLostError) else ()
                last = row or {"what": what, **run}
                save(given.output, [*others, {**last, "error": describe_error(error), "complete": True}])
                left = given.minutes - (time.monotonic() - begin) / 60
                print(f"the device is lost; going on without {list(names)} in a new process", flush=True)
                os.execv(sys.executable, go_on(argv, max(left, 0.0), names))
        gc.collect()
        torch._dynamo.reset()
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
