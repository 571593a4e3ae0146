"""Stage by stage: preprocess, trunk, proposals, RoIAlign, box head, final selection and NMS, beside the floor.

    python -m benchmarks.bench_stages -o FILE [--all]
    pytest benchmarks/bench_stages.py

Each stage runs on what the one before it made, as a turn of its own. On a GPU the native trunk and head are besides
compared with PyTorch's, and timed layer by layer.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import native_stages
from benchmarks.contest import find_floors, name_scene
from benchmarks.detector_stages import NETWORK, time_stages
from benchmarks.ours import FORMS, load, load_eager_parts, run_pipeline
from benchmarks.roofline import ITEMSIZES
from benchmarks.scene import QUICK_SIZE, SIZE, Scene, check, make_scene
from benchmarks.suite import Case, Effort, Measured, RunCase, Suite, run_suite
from benchmarks.timing import describe_times
from fpn_engine.backends import BoxHead, Trunk
from fpn_engine.roofline import measure_peaks

CHIEF = {"cuda": (("resnet50", 1), ("resnet50", 8)), "cpu": (("resnet50", 1),)}
FURTHER = (("resnet101", 1), ("resnet50", 2), ("resnet18", 1))
LAYERED = (1, 8)  # batches whose layers are timed
PYTORCH = "PyTorch's parts"
Load = Callable[[Scene], tuple[Trunk, BoxHead | None]]


def list_cases(effort: Effort) -> list[Case]:
    kind = effort.device.type
    if effort.quick:
        return [make_case("resnet18", QUICK_SIZE, 2, *form) for form in (("native", "fp32"), ("tensorrt", "fp16"))]
    chosen = [*CHIEF[kind], *FURTHER] if effort.every else CHIEF[kind]
    forms = [*FORMS[kind], (PYTORCH, "fp16" if kind == "cuda" else "fp32")]
    cases = [make_case(arch, SIZE, batch, *form) for (arch, batch), form in itertools.product(chosen, forms)]
    if kind == "cuda":
        cases += [native_stages.make_case(batch) for batch in LAYERED]
    return cases


def make_case(arch: str, size: tuple[int, int], batch: int, backend: str, precision: str) -> Case:
    if backend == PYTORCH:
        loader: Load = partial(load_eager_parts, precision=precision)
    else:
        loader = partial(load, backend=backend, precision=precision)
    measure_scene = partial(measure, arch=arch, size=size, batch=batch, precision=precision, loader=loader)
    return Case(what=f"{name_scene(arch, size, batch)}, {backend} {precision}", measure=measure_scene)


def measure(
    effort: Effort, arch: str, size: tuple[int, int], batch: int, precision: str, loader: Load
) -> Iterator[Measured]:
    scene = make_scene(arch, batch, size, effort.device, effort.quick)
    trunk, head = loader(scene)
    assert head is not None
    agreement = check(scene, run_pipeline(scene, trunk, head, precision))
    times, turns = time_stages(scene, trunk, head, effort.rounds, effort.seconds)
    medians = {name: times.spread(name).median for name in turns}
    whole = sum(medians.values())
    row = {
        "arch": arch,
        "batch": batch,
        "size": list(size),
        "precision": precision,
        "agreement": agreement,
        "stages": describe_times(times, turns),
        "sum_ms": float(f"{whole:.4g}"),
        "share_outside_network": round(1 - sum(medians[name] for name in NETWORK) / whole, 4),
        "complete": True,
    }
    if precision in ITEMSIZES:
        floors = find_floors(scene, precision, effort.quick)
        row |= {"floors_ms": floors.stages, "floors_of_parts_ms": floors.parts, **floors.beside(whole)}
        row["peaks"] = {precision: measure_peaks(scene.device.type, precision, effort.quick).to_dict()}
    yield Measured(row, [sum(spent) for spent in zip(*times.seconds.values(), strict=True)])


SUITE = Suite(name="stages", summary="one detector stage by stage, and its layers on a GPU", list_cases=list_cases)


def test_stages(case: Case, run_case: RunCase) -> None:
    run_case(case)


if __name__ == "__main__":
    sys.exit(run_suite(SUITE, sys.argv[1:]))
