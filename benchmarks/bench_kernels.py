"""Each op of fpn_kernels against torchvision, eager PyTorch and the floor, at the shapes of R50-FPN on 800x1216.

    python -m benchmarks.bench_kernels -o benchmarks/results/kernels.json --minutes 8
    python -m benchmarks.bench_kernels --floor

Every result is compared with each rival's before anything is timed; then all take turns (see ``benchmarks.timing``).
Rows are saved one by one, and those that are in the file already are not taken again. Without a GPU it measures the
PyTorch references on the CPU, and says so in each row. ``--floor`` runs nothing: it prints the bytes and products of
docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernel_case import Case, same, us
from benchmarks.kernel_cases import all_cases
from benchmarks.provenance import describe_run
from benchmarks.timing import time_in_turns

ROTATING = 4  # sets of inputs
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32


def measure(case: Case) -> dict[str, Any]:
    """A row of the results. Raises: AssertionError if a result is wrong."""
    inputs = [case.make_inputs(number) for number in range(ROTATING if DEVICE.type == "cuda" else 2)]
    error = check(case, inputs[0])
    times = time_in_turns(case.contestants, inputs)
    ours = times["fpn_kernels"]["median_us"]
    row = {
        "what": case.name,
        "batch": case.batch,
        "dtype": str(case.dtype).removeprefix("torch."),
        "implementation": "Triton kernels" if DEVICE.type == "cuda" else "PyTorch references, no GPU here",
        "largest_relative_error": float(f"{error:.2g}"),
        "times": times,
        "ratios": {name: round(ours / t["median_us"], 3) for name, t in times.items() if name != "fpn_kernels"},
        "bytes": case.moved,
        "GB_per_s": round(case.moved / ours / 1e3, 1),
        "targets_us": {name: round(target, 1) for name, target in case.targets.items()},
    }
    if case.flops:
        row["TFLOP_per_s"] = round(case.flops / ours / 1e6, 2)
    if DEVICE.type == "cuda":
        row["floor_us"] = round(us(case.moved, case.flops), 1)
    return row


def check(case: Case, inputs: tuple[Any, ...]) -> float:
    """Largest error against any rival. Raises: AssertionError if it is too large, or ours not what is expected."""
    ours = case.contestants["fpn_kernels"](*inputs)
    if case.expected is not None:
        assert same(ours, case.expected(*inputs)), f"{case.name}: not what the reference gives"
    errors = [case.compare(ours, rival(*inputs)) for name, rival in case.contestants.items() if name != "fpn_kernels"]
    assert max(errors) <= case.tolerance, f"{case.name}: error {max(errors)}"
    return max(errors)


def write_floor() -> str:
    """A Markdown table: what each op must move and compute at batch 1 in half precision, and how long that takes."""
    lines = [
        "| op | MB | GFLOP | floor us | good us | launches |",
        "|---|---|---|---|---|---|",
    ]
    for case in all_cases(torch.device("cpu"), [1], torch.float16):
        good = f"{case.targets['good']:.0f}" if case.targets else ""
        products = f"{case.flops / 1e9:.1f}" if case.flops else ""
        floor = f"{us(case.moved, case.flops):.1f}"
        lines.append(f"| {case.name} | {case.moved / 1e6:.2f} | {products} | {floor} | {good} | {case.launches} |")
    return "\n".join(lines)


@pytest.mark.parametrize("case", all_cases(DEVICE, [1], DTYPE), ids=lambda case: case.name)
def test_kernel(case: Case, benchmark: BenchmarkFixture) -> None:
    inputs = case.make_inputs(0)
    benchmark.extra_info["largest_relative_error"] = check(case, inputs)
    benchmark.pedantic(case.contestants["fpn_kernels"], args=inputs, rounds=3, iterations=1, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-o", "--output", type=Path)
    what.add_argument("--floor", action="store_true", help="print the table of docs/kernels.md")
    parser.add_argument("--minutes", type=float, default=60, help="no new row is begun after that many")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32] if DEVICE.type == "cuda" else [1])
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    given = parser.parse_args()
    if given.floor:
        print(write_floor())
        return
    if DEVICE.type == "cpu":
        print("no GPU here: the PyTorch references are measured on the CPU", file=sys.stderr)
    began = time.monotonic()
    rows = json.loads(given.output.read_text()) if given.output.exists() else []
    run = describe_run("python -m benchmarks.bench_kernels")
    failed: list[str] = []
    done = {(row["what"], row["batch"], row["dtype"], row["device"], row["commit"]) for row in rows}
    for case in all_cases(DEVICE, given.batches, DTYPE):
        key = (case.name, case.batch, str(case.dtype).removeprefix("torch."), run["device"], run["commit"])
        if key in done or given.only not in case.name:
            continue
        if time.monotonic() - began > 60 * given.minutes:
            print("out of time; the same command goes on", file=sys.stderr)
            break
        try:
            row = {**measure(case), **run}
        except Exception:  # of one op; the others can still be measured
            traceback.print_exc()
            failed.append(f"{case.name}, batch {case.batch}")
            continue
        rows.append(row)
        temporary = given.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(temporary, given.output)
        times = "  ".join(f"{name} {t['median_us']:.4g} us ({t['how']})" for name, t in row["times"].items())
        print(f"{case.name}, batch {case.batch}: {times}", flush=True)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
