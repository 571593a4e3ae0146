"""benchmarks/gpu_session.sh with a stand-in for Python: everything has its turn, whatever fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_session.sh"
# Fails in one group of tests, hangs in another, and leaves behind what a killed suite may.
PYTHON = """#!/bin/bash
echo "$@"
case "$*" in
  *tests/kernels*) exit 1 ;;
  *tests/engine/runtime*) exec sleep 60 ;;
  *benchmarks*) echo "$@" >> "$(dirname "$0")/given"
     for word in "$@"; do [ "$last" = -o ] && out=$word; last=$word; done
     touch "$out" "${out%/*}/.x.json.1.tmp" ;;
esac
"""


def run(tmp_path: Path, minutes: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "SMOKE_SECONDS": "1"}
    command = ["bash", str(SCRIPT), str(out), minutes, str(python)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60), out


def test_everything_has_its_turn(tmp_path: Path) -> None:
    done, out = run(tmp_path, "3")
    assert done.returncode == 1
    failed = sorted(line for line in done.stderr.splitlines() if line.startswith("failed: tests"))
    assert failed == ["failed: tests of kernels: exit code 1", "failed: tests of runtime: exit code 124"]
    assert sorted(path.name for path in out.iterdir()) == [
        "benchmarks.json",
        "benchmarks.log",
        "environment.txt",
        "replay.json",
        "tests-kernels.log",
        "tests-native.log",
        "tests-runtime.log",
    ]
    given = (tmp_path / "given").read_text().splitlines()
    modules = [line.split()[1] for line in given]
    assert modules == [
        *(
            f"benchmarks.{name}"
            for name in ("replay", "replay_masks", "bench_peers", "bench_precision", "bench_engine")
        ),
        "benchmarks",
    ], "the most wanted first"
    minutes = [float(line.split()[-1]) for line in given[2:]]
    assert 2.0 < minutes[-1] < 3.0, "all that is left"
    assert max(minutes[:-1]) < minutes[-1]


def test_without_time_it_says_so(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "0.2")
    assert done.stderr.count("no time was left for it") == 6
    assert not (tmp_path / "given").exists()


def test_it_asks_for_what_it_needs() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, "usage:" in done.stderr) == (2, True)
