"""All suites one after another, each in a process of its own with its share of the time.

    python -m benchmarks                             # what there is
    python -m benchmarks --all -o results/ --minutes 25

A suite writes OUTPUT/NAME.json, and adds to what is there. One that fails, or is not done when its time is up, does not
keep the others from running; then the exit code is 1. Those that need a GPU are left out where there is none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SOFT = 0.75  # of a suite's time, after which it begins nothing new; the rest is for what it is at
FAREWELL = 5.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A module that takes -o FILE and --minutes M. ``weight``: its part of the time, relative to the other suites'."""

    module: str
    what: str
    weight: float
    needs_gpu: bool


SUITES = {
    "kernels": Suite(
        module="benchmarks.bench_kernels", what="each op against torchvision and eager", weight=1.0, needs_gpu=False
    ),
    "native_stages": Suite(
        module="benchmarks.native_stages", what="native trunk and head, layer by layer", weight=1.0, needs_gpu=True
    ),
    "end_to_end": Suite(
        module="benchmarks.end_to_end", what="whole detectors, and their stages", weight=2.0, needs_gpu=True
    ),
}


def list_suites(suites: Mapping[str, Suite]) -> str:
    lines = [f"{name:14} {suite.what}{', on a GPU' * suite.needs_gpu}" for name, suite in suites.items()]
    return "\n".join([*lines, "", "python -m benchmarks --all -o FOLDER --minutes M runs them"])


def run_all(suites: Mapping[str, Suite], output: Path, minutes: float, has_gpu: bool) -> list[str]:
    """Run those that can run here; returns what went wrong, a line each. Time that one leaves goes to the others."""
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    chosen = {name: suite for name, suite in suites.items() if has_gpu or not suite.needs_gpu}
    for name in suites.keys() - chosen.keys():
        print(f"{name} is left out: there is no CUDA device here")
    waiting, failures = sum(suite.weight for suite in chosen.values()), []
    for name, suite in chosen.items():
        seconds = (end - time.monotonic()) * suite.weight / waiting
        waiting -= suite.weight
        if seconds <= 0:
            failures.append(f"{name}: no time was left for it")
            continue
        command = [sys.executable, "-m", suite.module, "-o", str(output / f"{name}.json")]
        command += ["--minutes", f"{SOFT * seconds / 60:.3f}"]
        print("+", *command, flush=True)
        if failure := run_for(command, seconds):
            failures.append(f"{name}: {failure}")
    return failures


def run_for(command: Sequence[str], seconds: float) -> str:
    """Run a command, stop it after ``seconds``; returns what went wrong, or nothing."""
    process = subprocess.Popen(command)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return f"stopped after {seconds / 60:.1f} minutes; what it had measured is saved"
    return f"exit code {code}" if code else ""


def main(argv: Sequence[str], suites: Mapping[str, Suite] = SUITES, has_gpu: bool | None = None) -> int:
    """``has_gpu``: None looks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="run them")
    parser.add_argument("-o", "--output", type=Path, help="a folder")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of them together")
    given = parser.parse_args(argv)
    if not given.all:
        print(list_suites(suites))
        return 0
    if given.output is None:
        parser.error("--all needs a folder: -o FOLDER")
    if has_gpu is None:
        import torch

        has_gpu = torch.cuda.is_available()
    failures = run_all(suites, given.output, given.minutes, has_gpu)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
