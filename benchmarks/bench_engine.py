"""Our detectors end to end: every backend and precision, R18, R50 and R101, three sizes, batches of 1 to 64.

    python -m benchmarks.bench_engine -o FILE [--all]
    pytest benchmarks/bench_engine.py

From uint8 images in device memory to padded detections. Contestants of a row have the same random weights, are checked
against torchvision in float32 without TF32, and take turns with it on the same images.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.contest import Contest, name_scene
from benchmarks.ours import list_ours, make_eager_parts
from benchmarks.rivals import list_base
from benchmarks.scene import QUICK_SIZE, SIZE, Maker, make_scene
from benchmarks.suite import Case, Effort, Measured, RunCase, Suite, run_suite

ARCHS = ("resnet50", "resnet101", "resnet18")
SIZES = (SIZE, (800, 1344), (640, 640))
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LARGEST_BATCH = {"cuda": 64, "cpu": 4}
PYTORCH = "fpn-engine, PyTorch's parts fp16"


def list_cases(effort: Effort) -> list[Case]:
    """R50 at the usual size first, from the smallest batch to the largest."""
    if effort.quick:
        return [make_case(effort, "resnet18", QUICK_SIZE, 1), make_case(effort, "resnet18", QUICK_SIZE, 99)]
    chosen = list(itertools.product(ARCHS, SIZES, BATCHES) if effort.every else chief_cases())
    chosen.sort(key=lambda case: (ARCHS.index(case[0]), SIZES.index(case[1]), case[2]))
    return [make_case(effort, *case) for case in chosen]


def chief_cases() -> Iterator[tuple[str, tuple[int, int], int]]:
    """Throughput against the batch on R50; each architecture and size once."""
    yield from ((ARCHS[0], SIZE, batch) for batch in BATCHES)
    yield from ((arch, SIZE, 1) for arch in ARCHS[1:])
    yield from ((ARCHS[0], size, 1) for size in SIZES[1:])


def make_case(effort: Effort, arch: str, size: tuple[int, int], batch: int) -> Case:
    kind = effort.device.type
    limit = effort.largest_batch or LARGEST_BATCH[kind]
    why_not = f"takes too long on a {kind.upper()}; --largest-batch {batch} runs it" if batch > limit else ""
    measure_scene = partial(measure, arch=arch, size=size, batch=batch)
    return Case(what=name_scene(arch, size, batch), measure=measure_scene, why_not=why_not)


def measure(effort: Effort, arch: str, size: tuple[int, int], batch: int) -> Iterator[Measured]:
    scene = make_scene(arch, batch, size, effort.device, effort.quick)
    groups: list[dict[str, Maker]] = [list_base(), list_ours(effort.device, effort.quick)]
    if effort.device.type == "cuda":  # what remains where the native backend fails
        groups[0][PYTORCH] = partial(make_eager_parts, precision="fp16")
    return Contest(scene, groups, effort).grow()


SUITE = Suite(
    name="engine", summary="whole detectors: backends, precisions, sizes and batches", list_cases=list_cases, weight=3.0
)


def test_engine(case: Case, run_case: RunCase) -> None:
    run_case(case)


if __name__ == "__main__":
    sys.exit(run_suite(SUITE, sys.argv[1:]))
