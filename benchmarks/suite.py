"""What every suite is made of: cases that are measured row by row, from a command or under pytest-benchmark."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks.provenance import describe_run
from benchmarks.rows import ResultFile, Row
from fpn_engine.ruler import ROUNDS, Times

ERROR_LENGTH = 300
QUICK_ROUNDS = 2
SECONDS = 60.0  # for the rounds of a row, the fewest in any case
BASE = "torchvision fp32"  # what whole detectors are compared with
OURS = "fpn"  # what the names of our contestants begin with


class DeviceLostError(Exception):
    """The device does not answer any more; the arguments are the contestants that it can have been."""


class NotHereError(Exception):
    """What cannot run on this machine; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        quick: small models and two rounds: a test of the suite itself, no measurement.
        every: all cases, not only those that targets and documents need.
        largest_batch: of whole detectors; None is 64 on a GPU, 4 on a CPU.
        left_out: contestants that broke the device before. chosen: patterns of contestants' names; all without.
        is_over: whether the time is up.
    """

    quick: bool = False
    every: bool = False
    largest_batch: int | None = None
    left_out: Sequence[str] = ()
    chosen: Sequence[str] = ()
    is_over: Callable[[], bool] = lambda: False

    def chooses(self, contestant: str) -> bool:
        """Whether it has its turn; torchvision's in fp32 always has."""
        return not self.chosen or contestant == BASE or any(fnmatchcase(contestant, each) for each in self.chosen)

    @property
    def rounds(self) -> int:
        """Of a row, where they do not take longer than ``seconds``."""
        return QUICK_ROUNDS if self.quick else ROUNDS[self.device.type]

    @property
    def seconds(self) -> float | None:
        """For the rounds of one row."""
        return None if self.quick else SECONDS

    @property
    def device(self) -> torch.device:
        """The GPU if there is one; a quick try needs none."""
        is_cuda = torch.cuda.is_available() and not self.quick
        return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Measured:
    """A row without its provenance: a row may grow, the last one has ``complete``.

    ``seconds``: what pytest-benchmark is to show, the times of the first contestant that is ours as a rule.
    """

    row: Row
    seconds: Sequence[float] = ()

    @classmethod
    def of(cls, row: Row, times: Times) -> Self:
        ours = (spent for name, spent in times.seconds.items() if name.startswith(OURS))
        return cls(row, next(ours, ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of a suite.

    Attributes:
        what: its name, unique in the suite.
        measure: the growing row. Raises AssertionError if a result is wrong, DeviceLostError.
        why_not: why it is not run here; then the row says so, and nothing is measured.
    """

    what: str
    measure: Callable[[Effort], Iterator[Measured]]
    why_not: str = ""

    def take(self, effort: Effort) -> Iterator[Measured]:
        if self.why_not:
            yield Measured({"not_run": self.why_not, "complete": True})
            return
        try:
            yield from self.measure(effort)
        except NotHereError as reason:
            yield Measured({"not_run": str(reason), "complete": True})


RunCase = Callable[[Case], Row]  # a fixture of conftest.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A module ``benchmarks.bench_NAME``. ``weight``: its part of the time, relative to the other suites'."""

    name: str
    summary: str
    list_cases: Callable[[Effort], list[Case]]
    weight: float = 1.0

    @property
    def module(self) -> str:
        return f"benchmarks.bench_{self.name}"


def run_suite(suite: Suite, argv: Sequence[str]) -> int:
    """The suite as a command; returns the exit code: 1 if anything failed or a target of this device was missed."""
    given, begin = parse(suite, argv), time.monotonic()
    effort = Effort(
        quick=given.quick,
        every=given.all,
        largest_batch=given.largest_batch,
        left_out=given.leave_out,
        chosen=given.contestant,
        is_over=lambda: time.monotonic() - begin > 60 * given.minutes,
    )
    prepare_device(effort.device)
    results = ResultFile(given.output)
    run = describe_run(shell_command(suite, given))
    failed: list[str] = []
    for case in suite.list_cases(effort):
        key = {"suite": suite.name, "what": case.what, **{name: run[name] for name in ("device", "commit")}}
        key["quick"] = given.quick
        if given.only not in case.what or results.find_complete(key):
            continue
        if effort.is_over():
            print(f"out of time before {case.what}; the same command goes on", file=sys.stderr)
            break
        row: Row = {}
        try:
            for measured in case.take(effort):
                row = {**key, **measured.row, **run}
                results.put(row)
                print(describe_row(row), flush=True)
            failed += [f"{case.what}: {name}" for name in contestants_that_failed(row)]
        except Exception as error:  # of one row; the others can still be taken
            traceback.print_exc()
            failed.append(case.what)
            if not is_device_alive(effort.device):
                names = error.args if isinstance(error, DeviceLostError) else ()
                results.put({**(row or {**key, **run}), "error": describe_error(error), "complete": True})
                left = given.minutes - (time.monotonic() - begin) / 60
                print(f"the device is lost; going on without {list(names)} in a new process", flush=True)
                os.execv(sys.executable, go_on(suite, argv, max(left, 0.0), names))
        gc.collect()
        torch._dynamo.reset()
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse(suite: Suite, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {suite.module}", description=suite.summary)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON; what is there is not taken again")
    add_options(parser)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this in it")
    parser.add_argument("--leave-out", action="append", default=[], metavar="NAME", help="a contestant")
    parser.add_argument(
        "--contestant",
        action="append",
        default=[],
        metavar="PATTERN",
        help="whole detectors of such names, beside torchvision's in fp32; the row is not complete then",
    )
    return parser.parse_args(argv)


def add_options(parser: argparse.ArgumentParser, minutes: float = 60.0) -> None:
    parser.add_argument("--minutes", type=float, default=minutes, help="no new row is begun after that many")
    parser.add_argument("--all", action="store_true", help="every case, not only the chief ones")
    parser.add_argument("--quick", action="store_true", help="small models on the CPU, two rounds: no measurement")
    parser.add_argument("--largest-batch", type=int, metavar="N", help="default 64 on a GPU, 4 on a CPU")


def shell_command(suite: Suite, given: argparse.Namespace) -> str:
    """What takes such rows: the machine's paths are left out."""
    words = [f"python -m {suite.module} -o FILE", *["--all"] * given.all, *["--quick"] * given.quick]
    words += [f"--contestant '{pattern}'" for pattern in given.contestant]
    return " ".join(words)


def go_on(suite: Suite, argv: Sequence[str], minutes: float, names: Sequence[str]) -> list[str]:
    """The command that takes what is left, without the contestants that may have broken the device."""
    left_out = [word for name in names for word in ("--leave-out", name)]
    return [sys.executable, "-m", suite.module, *argv, "--minutes", f"{minutes:.2f}", *left_out]


def prepare_device(device: torch.device) -> None:
    """float32 as float32: by itself torch convolves in TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def is_device_alive(device: torch.device) -> bool:
    """After an illegal access nothing works until the process ends."""
    try:
        return float(torch.ones(8, device=device).sum()) == 8.0
    except RuntimeError:
        return False


def describe_error(error: BaseException) -> str:
    """Its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:ERROR_LENGTH]


def contestants_that_failed(row: Mapping[str, Any]) -> list[str]:
    return [name for name, about in row.get("contestants", {}).items() if "error" in about]


def describe_row(row: Mapping[str, Any]) -> str:
    """For whoever watches."""
    if "not_run" in row:
        return f"{row['what']}: not run, {row['not_run']}"
    lines = [f"{row['what']}{'' if row['complete'] else ' (so far)'}"]
    for name, about in row.get("contestants", {}).items():
        if (spent := about.get("milliseconds")) is not None:
            text = f"{spent['median']:.4g} ms ({spent['p20']:.4g} to {spent['p80']:.4g})"
            text += "".join(f", {key} {value}" for key, value in about.items() if key.startswith("ratio"))
        else:
            text = f"not run: {about['not_run']}" if "not_run" in about else about.get("error", "")
        lines.append(f"  {name:60} {text}")
    return "\n".join(lines)
