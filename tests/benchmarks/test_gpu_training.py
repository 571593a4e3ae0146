"""benchmarks/gpu_training.sh with a stand-in for Python: the schedule fills the time, and both models get as much."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_training.sh"
# An update takes half a second after the first ten, which take one each.
PYTHON = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/given"
[ "$2" = "$FAILS" ] && exit 3
for word in "$@"; do
  [ "$last" = -o ] && out=$word
  [ "$last" = --steps ] && steps=$word
  last=$word
done
[ -n "$out" ] || exit 0
mkdir -p "$out"
touch "$out/best.pth" "$out/last.pth" "$out/state.pt"
echo "step,loss,seconds" > "$out/log.csv"
awk -v n="${steps:-1}" 'BEGIN { for (i = 1; i <= n; i++) print i ",1," (i < 11 ? i : 5 + i / 2) }' >> "$out/log.csv"
"""


def run(tmp_path: Path, minutes: str, fails: str = "") -> tuple[subprocess.CompletedProcess[str], Path]:
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "FAILS": fails}
    command = ["bash", str(SCRIPT), str(out), minutes, str(python)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60), out


def test_the_time_is_shared(tmp_path: Path) -> None:
    done, out = run(tmp_path, "10")
    assert done.returncode == 0, done.stderr
    given = [line.split() for line in (tmp_path / "given").read_text().splitlines()]
    trained = [words for words in given if "train" in words or "benchmarks.train_torchvision" in words]
    probe, ours, theirs = trained
    assert probe[probe.index("--steps") + 1] == "40"
    steps, minutes = int(ours[ours.index("--steps") + 1]), float(theirs[theirs.index("--minutes") + 1])
    assert 0.44 * 600 < steps * 0.5 <= 0.46 * 600
    assert 0.44 * 10 < minutes <= 0.46 * 10
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "environment.txt",
        "ours.log",
        "ours/best.pth",
        "ours/log.csv",
        "probe.log",
        "scenes.log",
        "torchvision.log",
        "torchvision/best.pth",
        "torchvision/last.pth",
        "torchvision/log.csv",
    ]


@pytest.mark.parametrize(("minutes", "reason"), [("0.2", "no time is left"), ("10", "")])
def test_what_does_not_work_is_told(tmp_path: Path, minutes: str, reason: str) -> None:
    done, _ = run(tmp_path, minutes, fails="" if reason else "benchmarks.train_torchvision")
    assert done.returncode != 0
    assert reason in done.stderr
