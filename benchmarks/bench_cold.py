"""Cold start, as whole processes: help, import, and one image from a plan on disk to JSON on stdout.

    python -m benchmarks.bench_cold -o FILE
    pytest benchmarks/bench_cold.py

Processes take turns, from start to exit. What ``fpn-engine infer`` prints is compared with what the engine finds in
this process. "overhead_ms" is the process less one detection of an engine that is warm.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.ours import build_for_cpu, why_not
from benchmarks.rows import Row
from benchmarks.scene import QUICK_SIZE, SIZE
from benchmarks.suite import Case, Effort, Measured, RunCase, Suite, run_suite
from fpn_engine.engine import Engine
from fpn_engine.errors import FpnEngineError
from fpn_engine.plan import Plan, write_plan
from fpn_engine.ruler import ROUNDS, WALL, Times, Turn, take_turns
from fpn_engine.spec import ModelSpec, numbered_categories
from tests.parity.random_detector import make_picture
from tests.parity.subject import Subject, random_subject

FORMS = (("onnxruntime", "fp32"), ("native", "fp32"), ("native", "bf16"), ("native", "int8"))
ERROR = 1e-3  # in score, of one process against another
WARM = 3  # detections of a warm engine
QUICK_STARTS = 3
STARTS = {
    "python alone": ["-c", "pass"],
    "import fpn_engine": ["-c", "import fpn_engine"],
    "fpn-engine --help": ["-m", "fpn_engine", "--help"],
    "fpn-engine infer --help": ["-m", "fpn_engine", "infer", "--help"],
    "import torch": ["-c", "import torch"],
}
# Milliseconds of each step in a fresh process.
PHASES = """
import json, sys, time
marks = [("begin", time.perf_counter())]
def mark(name): marks.append((name, time.perf_counter()))
from fpn_engine.engine import Engine
mark("import")
engine = Engine.load(sys.argv[1])
mark("load")
engine(sys.argv[2])
mark("first image")
engine(sys.argv[2])
mark("next image")
print(json.dumps({name: 1e3 * (end - begin) for (_, begin), (name, end) in zip(marks, marks[1:])}))
"""


@dataclass(frozen=True, slots=True)
class Ground:
    """A folder with a picture and the plans that can be had, and why others cannot."""

    picture: Path
    plans: dict[str, Path]
    missing: dict[str, str]


def list_cases(effort: Effort) -> list[Case]:
    what = "one image of {}x{}, {}".format(*(QUICK_SIZE if effort.quick else SIZE), "R18" if effort.quick else "R50")
    return [
        Case(what="start of a process", measure=measure_starts),
        Case(what=f"fpn-engine infer, {what}", measure=measure_infer),
        Case(what=f"steps in a fresh process, {what}", measure=measure_phases),
    ]


def measure_starts(effort: Effort) -> Iterator[Measured]:
    chosen = list(STARTS)[: QUICK_STARTS if effort.quick else None]
    times, about = time_processes({name: [sys.executable, *STARTS[name]] for name in chosen}, effort)
    yield Measured.of({"contestants": about, "complete": True}, times)


def measure_infer(effort: Effort) -> Iterator[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        ground = lay_out(Path(folder), effort.quick)
        commands = {name: infer_command(plan, ground.picture) for name, plan in ground.plans.items()}
        warm = {name: check_and_warm(plan, ground.picture, commands[name]) for name, plan in ground.plans.items()}
        times, about = time_processes(commands, effort)
    for name, milliseconds in warm.items():
        about[name] |= {
            "warm_detection_ms": float(f"{milliseconds:.4g}"),
            "overhead_ms": float(f"{times.spread(name).median - milliseconds:.4g}"),
        }
    missing = {name: {"not_run": reason} for name, reason in ground.missing.items()}
    yield Measured.of({"contestants": about | missing, "complete": True}, times)


def measure_phases(effort: Effort) -> Iterator[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        ground = lay_out(Path(folder), effort.quick)
        rounds = 1 if effort.quick else ROUNDS["cpu"]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ground.plans}
        for _ in range(rounds):
            for name, plan in ground.plans.items():
                found[name].append(json.loads(run([sys.executable, "-c", PHASES, str(plan), str(ground.picture)])))
    steps = {
        name: {step: float(f"{np.median([each[step] for each in all_of]):.4g}") for step in all_of[0]}
        for name, all_of in found.items()
    }
    whole = [sum(each.values()) / 1e3 for each in next(iter(found.values()))]
    yield Measured({"steps_ms": steps, "rounds": rounds, "complete": True}, whole)


def lay_out(folder: Path, quick: bool) -> Ground:
    subject = make_subject(quick)
    picture, plans, missing = folder / "picture.png", {}, {}
    Image.fromarray(make_picture(*(QUICK_SIZE if quick else SIZE))).save(picture)
    for backend, precision in FORMS[: 1 if quick else None]:
        name = f"fpn-engine infer, {backend} {precision}"
        if reason := why_not("cpu", backend, precision):
            missing[name] = reason
            continue
        try:
            plan = build_for_cpu(subject, backend, precision)
        except FpnEngineError as error:
            missing[name] = str(error)
            continue
        plans[name] = folder / f"{backend}-{precision}.plan"
        save_plan(plan, plans[name])
    return Ground(picture, plans, missing)


def make_subject(quick: bool) -> Subject:
    if quick:
        return random_subject("resnet18")
    small = ModelSpec(categories=numbered_categories(90), min_size=160, max_size=256)
    return random_subject("resnet50", small, representation_size=1024)


def save_plan(plan: Plan, path: Path) -> None:
    write_plan(path, plan.manifest, plan.parts)


def infer_command(plan: Path, picture: Path) -> list[str]:
    return [sys.executable, "-m", "fpn_engine", "infer", str(picture), "--plan", str(plan), "--json"]


def check_and_warm(plan: Path, picture: Path, command: Sequence[str]) -> float:
    """Milliseconds of a warm detection. Raises: AssertionError if the process finds anything else than the engine."""
    engine = Engine.load(plan)
    (wanted,) = engine(picture)
    (answer,) = json.loads(run(command))
    scores = [found["score"] for found in answer["detections"]]
    assert len(scores) == len(wanted.scores) > 0, f"{len(scores)} detections, not {len(wanted.scores)}"
    assert np.abs(np.sort(scores) - np.sort(wanted.scores)).max() <= ERROR
    turn = Turn(WALL, lambda number: None, lambda: engine(picture))
    return take_turns({"warm": turn}, "cpu", rounds=WARM).spread("warm").median


def time_processes(commands: dict[str, list[str]], effort: Effort) -> tuple[Times, dict[str, Row]]:
    def turn_of(command: list[str]) -> Turn:
        return Turn(WALL, lambda number: None, partial(run, command))

    turns = {name: turn_of(command) for name, command in commands.items()}
    rounds, warm_up = (1, 0) if effort.quick else (ROUNDS["cpu"], 1)
    times = take_turns(turns, "cpu", rounds=rounds, warm_up=warm_up)
    return times, {name: {"how": WALL, "milliseconds": times.spread(name).to_dict()} for name in commands}


def run(command: Sequence[str]) -> str:
    """Raises: AssertionError with what the process said if it failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[1:4]}: {done.stderr[-500:]}"
    return done.stdout


SUITE = Suite(name="cold", summary="processes from start to exit", list_cases=list_cases, weight=0.5)


def test_cold(case: Case, run_case: RunCase) -> None:
    run_case(case)


if __name__ == "__main__":
    sys.exit(run_suite(SUITE, sys.argv[1:]))
