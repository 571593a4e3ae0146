"""How time and memory grow with boxes, RoIs, classes, image area and batch, with the fitted exponents.

    python -m benchmarks.bench_scaling -o FILE [--all]
    pytest benchmarks/bench_scaling.py

All points of a row take turns. The exponent is the slope of log time against log size, by least squares, with its 95 %
confidence; a fixed cost at small sizes makes it less than what the largest sizes grow by. Memory is what a call needs
at its peak; of a detector on a GPU, whose graph has it all beforehand, what there is from its weights to its result.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

import fpn_kernels
from benchmarks.bench_kernels import DTYPES, OURS, check
from benchmarks.contest import set_up
from benchmarks.kernel_case import ROI_LEVELS, SIZE, TOLERANCE, largest_error
from benchmarks.nms_cases import plain_nms_case
from benchmarks.ours import make_ours
from benchmarks.pooling_cases import make_pooling_inputs, roi_align_by_level
from benchmarks.scaling import fit_power, measure_peak
from benchmarks.scene import make_scene
from benchmarks.suite import Case, Effort, Measured, RunCase, Suite, run_suite
from benchmarks.timing import prepare
from fpn_engine.ruler import Turn, take_turns
from tests.kernels.boxes import random_boxes, seeded

CLASS_ROWS, LIKELY, SCORE = 1000, 2, 0.05  # proposals, likely classes of each, the least score of a candidate
FORM = {"cuda": ("native", "fp16"), "cpu": ("onnxruntime", "fp32")}
QUICK_LEVELS = ((40, 56), (20, 28), (10, 14), (5, 7))
LARGEST_BATCH = {"cuda": 64, "cpu": 8}


class Point(NamedTuple):
    """The size, what is timed, and the bytes that it needed at its peak where the call does not take them."""

    size: int
    turn: Turn
    memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """``sizes`` from the smallest; ``make`` checks that the result is right before it gives the turn of one."""

    name: str
    sizes: Sequence[Any]
    quick_sizes: Sequence[Any]
    make: Callable[[Effort, Any], Point]

    def choose(self, effort: Effort) -> list[Any]:
        """The sizes that are measured: of batches those that the device is expected to hold."""
        if effort.quick:
            return list(self.quick_sizes)
        most = effort.largest_batch or LARGEST_BATCH[effort.device.type]
        return [size for size in self.sizes if self.make is not detect_batch or size <= most]


def nms(effort: Effort, boxes: int) -> Point:
    case = plain_nms_case(effort.device, boxes)
    inputs = [case.make_inputs(number) for number in range(2)]
    check(case, inputs[0])
    return Point(boxes, prepare(case.contestants[OURS], inputs, effort.device.type))


def roi_align(effort: Effort, rois: int) -> Point:
    dtype = DTYPES[effort.device.type]
    levels = QUICK_LEVELS if effort.quick else ROI_LEVELS
    inputs = [make_pooling_inputs(effort.device, 1, dtype, number, rois, levels) for number in range(2)]
    error = largest_error(fpn_kernels.multilevel_roi_align(*inputs[0]), roi_align_by_level(*inputs[0]))
    assert error <= TOLERANCE[dtype], f"RoIAlign of {rois} RoIs: error {error}"
    return Point(rois, prepare(fpn_kernels.multilevel_roi_align, inputs, effort.device.type))


def classify(effort: Effort, classes: int) -> Point:
    """Softmax, threshold, decoding and NMS of 1000 proposals."""
    device = effort.device
    counts, image_sizes = torch.full((1,), CLASS_ROWS, device=device), torch.tensor([SIZE], device=device)

    def make(number: int) -> list[Any]:
        logits = torch.randn(CLASS_ROWS, classes + 1, generator=seeded(number)) - math.log(classes)
        likely = torch.randint(1, classes + 1, (CLASS_ROWS, LIKELY), generator=seeded(number))
        logits.scatter_(1, likely, 3.0)  # as many candidates, however many classes there are
        deltas = torch.randn(CLASS_ROWS, 4 * (classes + 1), generator=seeded(number)) * 0.5
        return [tensor.to(device) for tensor in (logits, deltas, random_boxes(CLASS_ROWS, seed=number)[None])]

    def run(logits: torch.Tensor, deltas: torch.Tensor, proposals: torch.Tensor) -> Any:
        boxes, scores, labels = fpn_kernels.select_candidates(logits, deltas, proposals, counts, image_sizes)[:3]
        return scores, fpn_kernels.padded_nms(boxes, scores, labels, 0.5, 100)

    inputs = [make(number) for number in range(2)]
    expected = int((inputs[0][0].softmax(dim=1)[:, 1:] > SCORE).sum())
    found = int((run(*inputs[0])[0] > SCORE).sum())
    assert 0.99 * expected <= found <= expected, f"{found} candidates of {expected}"  # some are too small
    return Point(classes, prepare(run, inputs, device.type))


def detect(effort: Effort, at: int, size: tuple[int, int], batch: int = 1) -> Point:
    arch = "resnet18" if effort.quick else "resnet50"
    scene = make_scene(arch, batch, size, effort.device, effort.quick)
    backend, precision = FORM[effort.device.type]
    contestant, found = set_up(scene, partial(make_ours, backend=backend, precision=precision))
    return Point(at, contestant.turn, found.get("peak_memory_bytes"))


def detect_sized(effort: Effort, size: tuple[int, int]) -> Point:
    return detect(effort, size[0] * size[1], size)


def detect_batch(effort: Effort, batch: int) -> Point:
    return detect(effort, batch, (128, 160) if effort.quick else SIZE, batch)


AXES = (
    Axis(
        name="NMS against boxes",
        sizes=(1_000, 3_000, 10_000, 30_000, 100_000),
        quick_sizes=(300, 600, 1_200),
        make=nms,
    ),
    Axis(
        name="RoIAlign against RoIs",
        sizes=(125, 250, 500, 1_000, 2_000, 4_000),
        quick_sizes=(10, 20, 40),
        make=roi_align,
    ),
    Axis(
        name="final selection and NMS against classes",
        sizes=(5, 20, 80, 320, 1_280),
        quick_sizes=(5, 10, 20),
        make=classify,
    ),
    Axis(
        name="whole detector against image area",
        sizes=((320, 480), (480, 704), (640, 960), (800, 1216), (1024, 1536)),
        quick_sizes=((96, 128), (128, 160), (160, 224)),
        make=detect_sized,
    ),
    Axis(
        name="whole detector against batch",
        sizes=(1, 2, 4, 8, 16, 32, 64),
        quick_sizes=(1, 2, 3),
        make=detect_batch,
    ),
)


def list_cases(effort: Effort) -> list[Case]:
    return [Case(what=axis.name, measure=partial(measure, axis=axis)) for axis in AXES]


def measure(effort: Effort, axis: Axis) -> Iterator[Measured]:
    kind = effort.device.type
    with torch.inference_mode():
        points = [axis.make(effort, size) for size in axis.choose(effort)]
        turns = {f"{point.size}": point.turn for point in points}
        times = take_turns(turns, kind, rounds=effort.rounds, seconds=effort.seconds)
        peaks = [p.memory if p.memory is not None else measure_peak(p.turn.run, effort.device) for p in points]
    medians = [times.spread(name).median for name in turns]
    sizes = [point.size for point in points]
    row: dict[str, Any] = {
        "axis": axis.name.partition(" against ")[2],
        "points": [
            {"size": size, "milliseconds": times.spread(str(size)).to_dict(), "peak_memory_bytes": peak}
            for size, peak in zip(sizes, peaks, strict=True)
        ],
        "time": fit_power(sizes, medians).to_dict(),
        "complete": True,
    }
    if all(peaks):
        row["memory"] = fit_power(sizes, [float(peak or 0) for peak in peaks]).to_dict()
    if axis.make in (detect_sized, detect_batch):
        row["form"] = " ".join(FORM[kind])
    yield Measured(row, times.seconds[str(sizes[-1])])


SUITE = Suite(name="scaling", summary="how time and memory grow, with fitted exponents", list_cases=list_cases)


def test_scaling(case: Case, run_case: RunCase) -> None:
    run_case(case)


if __name__ == "__main__":
    sys.exit(run_suite(SUITE, sys.argv[1:]))
