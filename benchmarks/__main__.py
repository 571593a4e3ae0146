"""All suites one after another, each in a process of its own with its share of the time; and the report.

    python -m benchmarks                                     # what there is
    python -m benchmarks -o benchmarks/results/DEVICE.json [--all] [--minutes 60]
    python -m benchmarks --all -o results/                   # a file in this folder that is named after the device
    python -m benchmarks report [RESULTS...] -o report.html [--pictures FOLDER]

Rows are added to the file one by one, and those that are in it are not taken again at the same commit, so that the same
command goes on where it was stopped. A suite that fails, or is not done when its time is up, does not keep the others
from running. The exit code is 1 then, and where a target of this device is missed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fpn_engine.errors import FpnEngineError

SOFT = 0.8  # of a suite's time, after which it begins nothing new; the rest is for what it is at
FAREWELL = 5.0  # seconds
NAMES = ("peers", "engine", "stages", "kernels", "precision", "scaling", "cold", "paper")  # in this order


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A module that takes -o FILE and --minutes M. ``weight``: its part of the time, relative to the others'."""

    module: str
    summary: str
    weight: float = 1.0


def find_commands() -> dict[str, Command]:
    found = {}
    for name in NAMES:
        suite = importlib.import_module(f"benchmarks.bench_{name}").SUITE
        found[name] = Command(module=suite.module, summary=suite.summary, weight=suite.weight)
    return found


def run_all(commands: dict[str, Command], output: Path, minutes: float, options: Sequence[str]) -> list[str]:
    """Returns what went wrong, a line each. Time that one leaves goes to the others."""
    end = time.monotonic() + 60 * minutes
    waiting, failures = sum(command.weight for command in commands.values()), []
    for name, command in commands.items():
        seconds = (end - time.monotonic()) * command.weight / waiting
        waiting -= command.weight
        if seconds <= 0:
            failures.append(f"{name}: no time was left for it")
            continue
        words = [sys.executable, "-m", command.module, "-o", str(output), *options]
        words += ["--minutes", f"{SOFT * seconds / 60:.3f}"]
        print("+", *words, flush=True)
        if failure := run_for(words, seconds):
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


def judge(output: Path) -> list[str]:
    """Print every target that there is a row for; returns those that were missed where they must not be."""
    from benchmarks.rows import latest, read_rows
    from benchmarks.targets import Targets

    verdicts = Targets.load_all().judge(latest(read_rows(output))) if output.exists() else []
    for verdict in verdicts:
        print(f"{verdict}{'' if verdict.is_here else f' (a target of {verdict.target_device}, for information)'}")
    return [f"target {verdict}" for verdict in verdicts if verdict.is_failure]


def find_output(given: str) -> Path:
    """The file of rows: the one that is given, or in a folder, which there need not be yet, the device's."""
    if not (given.endswith(("/", os.sep)) or Path(given).is_dir()):
        return Path(given)
    from fpn_engine.provenance import describe_machine

    words = re.sub(r"[^a-z0-9]+", "-", describe_machine()["device"].lower()).strip("-")
    return Path(given) / f"{words or 'device'}.json"


def main(argv: Sequence[str], commands: dict[str, Command] | None = None) -> int:
    if argv[:1] == ["report"]:
        from benchmarks.report import main as report

        try:
            return report(argv[1:])
        except FpnEngineError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="run them; added to; in a folder, a file named after the device"
    )
    parser.add_argument("--all", action="store_true", help="every case, not only the chief ones")
    parser.add_argument("--quick", action="store_true", help="small models on the CPU, two rounds: no measurement")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of them together")
    parser.add_argument("--only", nargs="+", metavar="SUITE", help="these suites")
    given = parser.parse_args(argv)
    commands = find_commands() if commands is None else commands
    if unknown := set(given.only or ()) - commands.keys():
        parser.error(f"there is no suite {', '.join(sorted(unknown))}; there are {', '.join(commands)}")
    chosen = {name: command for name, command in commands.items() if not given.only or name in given.only}
    if given.output is None:
        print("\n".join(f"{name:12} {command.summary}" for name, command in chosen.items()))
        print("\npython -m benchmarks -o DEVICE.json runs them, python -m benchmarks report -o report.html shows them")
        return 0
    output = find_output(given.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    options = [*["--all"] * given.all, *["--quick"] * given.quick]
    failures = run_all(chosen, output, given.minutes, options) + judge(output)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
