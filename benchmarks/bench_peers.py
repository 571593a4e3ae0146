"""Everybody side by side: torchvision in its forms, ONNX Runtime on torchvision's own export, and our backends.

    python -m benchmarks.bench_peers -o FILE [--all]
    pytest benchmarks/bench_peers.py

From uint8 images in device memory to detections, the same random weights in each, checked against torchvision in
float32 without TF32, in turns on the same images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.bench_engine import LARGEST_BATCH
from benchmarks.contest import Contest, name_scene
from benchmarks.ours import list_ours
from benchmarks.rivals import list_compiled, list_rivals
from benchmarks.scene import QUICK_SIZE, SIZE, Maker, make_scene
from benchmarks.suite import Case, Effort, Measured, RunCase, Suite, run_suite

CHIEF = (("resnet50", 1), ("resnet50", 8), ("resnet101", 1))
FURTHER = (("resnet50", 16), ("resnet50", 32), ("resnet101", 8), ("resnet18", 1))


def list_cases(effort: Effort) -> list[Case]:
    if effort.quick:
        return [make_case("resnet18", QUICK_SIZE, 1)]
    limit = effort.largest_batch or LARGEST_BATCH[effort.device.type]
    chosen = [*CHIEF, *FURTHER] if effort.every else CHIEF
    why_not = f"takes too long on a {effort.device.type.upper()}; --largest-batch runs it"
    return [make_case(arch, SIZE, batch, why_not if batch > limit else "") for arch, batch in chosen]


def make_case(arch: str, size: tuple[int, int], batch: int, why_not: str = "") -> Case:
    measure_scene = partial(measure, arch=arch, size=size, batch=batch)
    return Case(what=name_scene(arch, size, batch), measure=measure_scene, why_not=why_not)


def measure(effort: Effort, arch: str, size: tuple[int, int], batch: int) -> Iterator[Measured]:
    scene = make_scene(arch, batch, size, effort.device, effort.quick)
    groups: list[dict[str, Maker]] = [list_rivals(effort.device), list_ours(effort.device, effort.quick)]
    if not effort.quick:
        groups.append(list_compiled(effort.device))
    return Contest(scene, groups, effort).grow()


SUITE = Suite(
    name="peers", summary="torchvision's forms, ONNX Runtime and our backends", list_cases=list_cases, weight=2.0
)


def test_peers(case: Case, run_case: RunCase) -> None:
    run_case(case)


if __name__ == "__main__":
    sys.exit(run_suite(SUITE, sys.argv[1:]))
