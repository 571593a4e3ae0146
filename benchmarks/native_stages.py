"""Trunk and box head of the native backend on CUDA against PyTorch's own, and layer by layer against the floor.

R50-FPN with random calibrated weights, 91 classes, 800x1216, fp16. What the parts answer is compared with PyTorch's
before they are timed in turns. Tactics that were measured are in the timing cache. The layers' times are the tuner's,
each with cold caches. ``benchmarks.bench_stages`` runs this.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_case import us
from benchmarks.plans import build
from benchmarks.scene import SIZE, Scene, make_scene
from benchmarks.suite import Case, Effort, Measured
from benchmarks.timing import Function, describe_times, time_in_turns
from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.cuda.choices import PART, Choices, TunedTactics
from fpn_engine.backends.native.cuda.executor import CudaExecutor
from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.loading import find_work
from fpn_engine.backends.native.cuda.timing_cache import TimingCache
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.packing import unpack_part
from fpn_engine.backends.native.parts import MakeExecutor, NativeHead, NativeTrunk
from fpn_engine.backends.native.program import Program
from fpn_engine.plan import Plan
from fpn_export.native.tactics import TuneFor

ROIS = 1000
ROTATING = 4  # sets of inputs
ERROR = 0.03  # of the largest magnitude, of fp16 against fp16, which round at different places
TUNING_SECONDS = {"quick": 60.0, "full": 300.0}


def floor_us(work: Work) -> float:
    """Products at the measured rate or every operand once at the measured bandwidth, whichever takes longer."""
    itemsize, out_size = (DTYPES[dtype].itemsize for dtype in (work.dtype, work.out_dtype))
    numbers = _count(work.x) + _count(work.weight) + (_count(work.residual_shape()) if work.has_residual else 0)
    moved = numbers * itemsize + _count(work.out) * out_size
    return us(moved, 2 * work.rows * work.columns * work.depth)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def describe_layers(works: list[Work], cache: TimingCache) -> list[dict[str, Any]]:
    """The tactic of each layer, its time and its floor, the largest gap first."""
    rows = []
    for work in works:
        if timed := cache.timed.get(work.key):
            floor = floor_us(work)
            rows.append(
                {
                    "layer": work.key,
                    "tactic": str(timed.tactic),
                    "us": round(timed.microseconds, 1),
                    "floor_us": round(floor, 1),
                    "TFLOP_per_s": round(2 * work.rows * work.columns * work.depth / timed.microseconds / 1e6, 1),
                    "gap_us": round(timed.microseconds - floor, 1),
                }
            )
    return sorted(rows, key=lambda row: -row["gap_us"])


def compare(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest error, of the largest magnitude. Raises: AssertionError if it is too large."""
    errors = [
        float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in zip(ours, theirs, strict=True)
    ]
    assert max(errors) <= ERROR, f"native and PyTorch differ by {max(errors):.2g}"
    return max(errors)


def load_as_tuned(plan: Plan) -> tuple[NativeTrunk, NativeHead]:
    """Trunk and head of a detector with what the build measured."""
    spec, make = plan.manifest.spec, executors_as_tuned(plan)
    trunk = NativeTrunk(*unpack_part("trunk", plan.parts), spec, make_executor=make)
    return trunk, NativeHead(*unpack_part("head", plan.parts), spec, make_executor=make)


def executors_as_tuned(plan: Plan) -> MakeExecutor:
    """Makes executors with what the build measured; to load the plan would be to measure what it left."""
    device = torch.device("cuda", torch.cuda.current_device())
    choices = Choices(Gpu.of_device(device), TunedTactics.read(plan.parts[PART]).tactics)

    def make(program: Program, weights: Mapping[str, Tensor]) -> CudaExecutor:
        return CudaExecutor(program, weights, choices, device)

    return make


def make_case(batch: int) -> Case:
    what = f"R50-FPN, {SIZE[0]}x{SIZE[1]}, batch {batch}, native fp16, layer by layer"
    return Case(what=what, measure=partial(measure, batch=batch))


def measure(effort: Effort, batch: int) -> Iterator[Measured]:
    """Trunk and head in turns with PyTorch's, then the layers: the row grows."""
    scene = make_scene("resnet50", batch, SIZE, effort.device)
    begin = time.perf_counter()
    level = "full" if effort.every else "quick"
    plan = build(
        scene.subject, "fp16", "native", TuneFor(level=level, shapes=((batch, *SIZE),), seconds=TUNING_SECONDS[level])
    )
    row: dict[str, Any] = {"batch": batch, "tactics": level, "contestants": {}, "complete": False}
    row["build_seconds"] = round(time.perf_counter() - begin, 1)
    trunk, head = load_as_tuned(plan)
    row["arena_bytes"] = trunk.executor.plan((batch, *SIZE, 3)).arena_bytes
    spent: dict[str, Sequence[float]] = {}
    with torch.inference_mode():
        for part, (ours, eager, inputs) in list_parts(scene, trunk, head).items():
            error = compare(ours(inputs[0]), eager(inputs[0]))
            functions = {"native fp16": ours, "torch eager fp16": eager, "torch.compile fp16": torch.compile(eager)}
            named = {f"{part}, {name}": function for name, function in functions.items()}
            times, turns = time_in_turns(named, [[x] for x in inputs], seconds=effort.seconds)
            row["contestants"] |= describe_times(times, turns)
            row[f"largest_error_of_{part}"] = float(f"{error:.2g}")
            row.setdefault("ratios", {}).update({name: times.ratio(next(iter(named)), name) for name in named})
            spent |= times.seconds
            yield Measured(row)
    works = find_work(plan.parts, scene.subject.spec, TunedTactics.read(plan.parts[PART]))
    gpu = Gpu.of_device(torch.device("cuda", torch.cuda.current_device()))
    layers = describe_layers(works, TimingCache(gpu))
    row["sum_us"] = round(sum(layer["us"] for layer in layers), 1)
    row["sum_floor_us"] = round(sum(layer["floor_us"] for layer in layers), 1)
    yield Measured({**row, "layers": layers, "complete": True})


def list_parts(
    scene: Scene, trunk: NativeTrunk, head: NativeHead
) -> dict[str, tuple[Function, Function, list[Tensor]]]:
    """Ours, PyTorch's and inputs of each part, all in fp16 and channels_last."""
    device, spec = scene.device, scene.subject.spec
    model = copy.deepcopy(scene.subject.model).to(device, torch.float16, memory_format=torch.channels_last).eval()

    def flat(run: Function) -> Function:
        def call(images: Tensor) -> list[Tensor]:
            out = run(images)
            return [*out.features, *out.objectness, *out.deltas]

        return call

    images = [torch.randn(scene.batch, 3, *SIZE, device=device).half() for _ in range(ROTATING)]
    side = spec.box_roi_pool.output_size
    shape = (scene.batch * ROIS, spec.feature_channels, side, side)
    rois = [torch.randn(shape, device=device).half() for _ in range(ROTATING)]
    return {
        "trunk": (flat(trunk), flat(model.trunk), images),
        "head": (
            lambda roi: list(head(roi)),
            lambda roi: list(model.head(roi)),
            [roi.contiguous(memory_format=torch.channels_last) for roi in rois],
        ),
    }
