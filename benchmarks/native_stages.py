"""Trunk and box head of the native backend on CUDA against PyTorch's own, and layer by layer against the floor.

    python -m benchmarks.native_stages -o benchmarks/results/native_stages.json --minutes 8 [--tactics full]

R50-FPN with random calibrated weights, 91 classes, 800x1216, fp16. What the parts answer is compared with PyTorch's
before they are timed in turns. A row is saved as soon as it is there, and one that is in the file is not taken again;
tactics that were measured are in the timing cache. The layers' times are the tuner's, each with cold caches.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_case import us
from benchmarks.provenance import describe_run
from benchmarks.timing import time_in_turns
from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.cuda.choices import PART, Choices, TunedTactics
from fpn_engine.backends.native.cuda.executor import CudaExecutor
from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.loading import find_work
from fpn_engine.backends.native.cuda.timing_cache import TimingCache
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.parts import NativeHead, NativeTrunk, unpack_part
from fpn_engine.backends.native.program import Program
from fpn_engine.plan import Plan, read_plan
from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.build import build_plan
from fpn_export.native.tactics import TuneFor
from tests.parity.subject import Subject, random_subject

SIZE = (800, 1216)
ROIS = 1000
ROTATING = 4  # sets of inputs
ERROR = 0.03  # of the largest magnitude, of fp16 against fp16, which round at different places
COMMAND = "python -m benchmarks.native_stages"
Function = Callable[..., Any]


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


def build(subject: Subject, tune_for: TuneFor, precision: str = "fp16") -> Plan:
    """A plan for CUDA; what is measured stays in the timing cache."""
    with tempfile.TemporaryDirectory() as folder:
        model, plan = Path(folder) / "model.onnx", Path(folder) / "model.plan"
        model.write_bytes(subject.onnx_model.SerializeToString())
        build_plan(model, plan, precision=precision, tune_for=tune_for, on_note=print)
        return read_plan(plan)


def load_as_tuned(plan: Plan) -> tuple[NativeTrunk, NativeHead]:
    """Trunk and head with what the build measured; to load the plan would be to measure what it left."""
    device = torch.device("cuda", torch.cuda.current_device())
    choices = Choices(Gpu.of_device(device), TunedTactics.read(plan.parts[PART]).tactics)

    def make(program: Program, weights: Mapping[str, Tensor]) -> CudaExecutor:
        return CudaExecutor(program, weights, choices, device)

    spec = plan.manifest.spec
    trunk = NativeTrunk(*unpack_part("trunk", plan.parts), spec, make_executor=make)
    return trunk, NativeHead(*unpack_part("head", plan.parts), spec, make_executor=make)


def make_rows(subject: Subject, batch: int, level: str, seconds: float, known: set[str]) -> Iterator[dict[str, Any]]:
    """Trunk, head and layers for one batch size; those whose names are known are left out."""
    names = {part: f"{part} batch {batch} {level}" for part in ("trunk", "head", "layers")}
    if known >= set(names.values()):
        return
    begin = time.perf_counter()
    plan = build(subject, TuneFor(level=level, shapes=((batch, *SIZE),), seconds=seconds))
    built = round(time.perf_counter() - begin, 1)
    trunk, head = load_as_tuned(plan)
    device = torch.device("cuda")
    model = copy.deepcopy(subject.model).to(device, torch.float16, memory_format=torch.channels_last).eval()

    def flat(images: Tensor) -> list[Tensor]:
        out = trunk(images)
        return [*out.features, *out.objectness, *out.deltas]

    def flat_torch(images: Tensor) -> list[Tensor]:
        out = model.trunk(images)
        return [*out.features, *out.objectness, *out.deltas]

    spec = subject.spec
    images = [torch.randn(batch, 3, *SIZE, device=device).half() for _ in range(ROTATING)]
    side = spec.box_roi_pool.output_size
    rois = [torch.randn(batch * ROIS, spec.feature_channels, side, side, device=device).half() for _ in range(ROTATING)]
    rois = [roi.contiguous(memory_format=torch.channels_last) for roi in rois]
    parts: dict[str, tuple[Function, Function, list[Tensor]]] = {
        "trunk": (flat, flat_torch, images),
        "head": (lambda roi: list(head(roi)), lambda roi: list(model.head(roi)), rois),
    }
    with torch.inference_mode():
        for part, (ours, eager, inputs) in parts.items():
            if names[part] in known:
                continue
            error = compare(ours(inputs[0]), eager(inputs[0]))
            contestants = {"native fp16": ours, "torch eager fp16": eager, "torch.compile fp16": torch.compile(eager)}
            times = time_in_turns(contestants, [[x] for x in inputs])
            best = times["native fp16"]["median_us"]
            yield {
                "what": names[part],
                "largest_error": float(f"{error:.2g}"),
                "times": times,
                "ratios": {name: round(best / t["median_us"], 3) for name, t in times.items() if name != "native fp16"},
                "arena_bytes": trunk.executor.plan((batch, *SIZE, 3)).arena_bytes,
                "build_seconds": built,
            }
    works = find_work(plan.parts, spec, TunedTactics.read(plan.parts[PART]))
    layers = describe_layers(works, TimingCache(Gpu.of_device(torch.device("cuda", torch.cuda.current_device()))))
    yield {
        "what": names["layers"],
        "sum_us": round(sum(row["us"] for row in layers), 1),
        "sum_floor_us": round(sum(row["floor_us"] for row in layers), 1),
        "layers": layers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON, added to")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further row is begun")
    parser.add_argument("--tactics", choices=("quick", "full"), default="quick")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "there is no CUDA device here\n")
    begin = time.perf_counter()
    rows = json.loads(given.output.read_text()) if given.output.exists() else []
    # As large as the COCO model; calibrated on small pictures, run at full size.
    small = ModelSpec(categories=numbered_categories(90), min_size=160, max_size=256)
    subject = random_subject("resnet50", small, representation_size=1024)
    for batch in given.batches:
        left = 60 * given.minutes - (time.perf_counter() - begin)
        if left <= 0:
            print(f"batch {batch} is left out: the time is up")
            continue
        for row in make_rows(subject, batch, given.tactics, left / 2, {row["what"] for row in rows}):
            rows.append(row | describe_run(f"{COMMAND} --tactics {given.tactics}"))
            given.output.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps({key: value for key, value in row.items() if key != "layers"}), flush=True)
            for layer in row.get("layers", []):
                print(f"{layer['us']:8.1f} us, floor {layer['floor_us']:6.1f}: {layer['tactic']:44} {layer['layer']}")


if __name__ == "__main__":
    main()
