"""Each op of fpn_kernels against torchvision, eager PyTorch and the floor, at the shapes of R50-FPN on 800x1216.

    python -m benchmarks.bench_kernels -o FILE [--all]
    python -m benchmarks.bench_kernels --floor
    pytest benchmarks/bench_kernels.py

Every result is compared with each rival's before anything is timed; then all take turns. Without a GPU it measures the
PyTorch references on the CPU, and says so in each row. ``--floor`` runs nothing: it prints the bytes and products of
docs/kernels.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernel_case import KernelCase, same, us
from benchmarks.kernel_cases import all_cases
from benchmarks.suite import Case, Effort, Measured, RunCase, Suite, run_suite
from benchmarks.targets import Targets
from benchmarks.timing import describe_times, time_in_turns
from fpn_engine.roofline import measure_peaks

NAME = "kernels"
ROTATING = {"cuda": 4, "cpu": 2}  # sets of inputs
DTYPES = {"cuda": torch.float16, "cpu": torch.float32}
PRECISIONS = {torch.float16: "fp16", torch.float32: "fp32"}
BATCHES = {"cuda": (1, 8, 32), "cpu": (1,)}
OURS = "fpn_kernels"
QUICK = ("anchors", "final NMS", "NMS, 1000 boxes")
TARGET_DEVICE, TARGET_STEP = "NVIDIA H200", "good"  # of the table in docs/kernels.md


def list_cases(effort: Effort) -> list[Case]:
    kind = effort.device.type
    batches = BATCHES[kind] if effort.every or kind == "cpu" else BATCHES[kind][:2]
    cases = all_cases(effort.device, batches, DTYPES[kind])
    if effort.quick:
        cases = [case for case in cases if case.name.startswith(QUICK)]
    return [Case(what=name_case(case), measure=partial(measure, case=case)) for case in cases]


def name_case(case: KernelCase) -> str:
    return f"{case.name}, batch {case.batch}"


def measure(effort: Effort, case: KernelCase) -> Iterator[Measured]:
    """Raises: AssertionError if a result is wrong."""
    kind = effort.device.type
    inputs = [case.make_inputs(number) for number in range(ROTATING[kind])]
    error = check(case, inputs[0])
    times, turns = time_in_turns(case.contestants, inputs, rounds=effort.rounds, seconds=effort.seconds)
    ours = times.spread(OURS).median
    peaks = measure_peaks(kind, PRECISIONS[case.dtype], effort.quick)
    floor = peaks.milliseconds(case.moved, case.flops)
    row = {
        "batch": case.batch,
        "precision": PRECISIONS[case.dtype],
        "implementation": "Triton kernels" if kind == "cuda" else "PyTorch references, no GPU here",
        "largest_relative_error": float(f"{error:.2g}"),
        "contestants": describe_times(times, turns),
        "ratios": {name: times.ratio(OURS, name) for name in case.contestants if name != OURS},
        "bytes": case.moved,
        "GB_per_s": float(f"{case.moved / ours / 1e6:.4g}"),
        "floor_ms": float(f"{floor:.4g}"),
        "share_of_floor": float(f"{floor / ours:.3g}"),
        "peaks": {PRECISIONS[case.dtype]: peaks.to_dict()},
        "complete": True,
    }
    if case.flops:
        row["TFLOP_per_s"] = float(f"{case.flops / ours / 1e9:.4g}")
    yield Measured.of(row, times)


def check(case: KernelCase, inputs: tuple[object, ...]) -> float:
    """Largest error against any rival. Raises: AssertionError if it is too large, or ours not what is expected."""
    ours = case.contestants[OURS](*inputs)
    if case.expected is not None:
        assert same(ours, case.expected(*inputs)), f"{case.name}: not what the reference gives"
    errors = [case.compare(ours, rival(*inputs)) for name, rival in case.contestants.items() if name != OURS]
    assert max(errors) <= case.tolerance, f"{case.name}: error {max(errors)}"
    return max(errors)


def write_floor() -> str:
    """A Markdown table: what each op must move and compute at batch 1 in half precision, and how long that takes."""
    good = {
        target.what: f"{1e3 * target.at_most:.0f}"
        for target in Targets.load_all().of[TARGET_DEVICE]
        if target.suite == NAME and target.step == TARGET_STEP and target.at_most is not None
    }
    lines = [
        "| op | MB | GFLOP | floor us | good us | launches |",
        "|---|---|---|---|---|---|",
    ]
    for case in all_cases(torch.device("cpu"), [1], torch.float16):
        products = f"{case.flops / 1e9:.1f}" if case.flops else ""
        floor, target = f"{us(case.moved, case.flops):.1f}", good.get(name_case(case), "")
        lines.append(f"| {case.name} | {case.moved / 1e6:.2f} | {products} | {floor} | {target} | {case.launches} |")
    return "\n".join(lines)


SUITE = Suite(name=NAME, summary="each op against torchvision and eager", list_cases=list_cases)


def test_kernels(case: Case, run_case: RunCase) -> None:
    run_case(case)


if __name__ == "__main__":
    if sys.argv[1:] == ["--floor"]:
        print(write_floor())
    else:
        sys.exit(run_suite(SUITE, sys.argv[1:]))
