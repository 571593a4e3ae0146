"""The folder of a run: what a full disk and a power cut leave of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpn_engine.errors import CheckpointError, FpnEngineError
from fpn_export.training.run_folder import LOG, SCORES, RunFolder, State

SETTINGS = {"spec": {}, "recipe": {}, "data": {}}
WELL = "step,rate,loss\r\n1,0.1,2.5\r\n2,0.1,nan\r\n"

# Writes beyond 8 KiB fail from then on.
FILL_DISK = """
import resource, sys
import torch
from pathlib import Path
from fpn_engine.errors import FpnEngineError
from fpn_export.training.run_folder import RunFolder
from tests.export.training.test_run_folder import make_state
from tests.export.training.squares import tiny_spec
from fpn_export.detector import make_detector

folder, model = RunFolder(Path(sys.argv[1])), make_detector(tiny_spec(), representation_size=16)
folder.save_state(make_state(1, 10))
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
for write in (
    lambda: folder.save_state(make_state(2, 100_000)),
    lambda: folder.save_model("best", model, {}),
    lambda: [folder.log("log.csv", {"step": step, "loss": 1.5}) for step in range(10_000)],
):
    try:
        write()
    except FpnEngineError as error:
        print(error)
"""


def make_state(step: int, size: int) -> State:
    weights = {"weight": torch.zeros(size)}
    return State(step=step, weights=weights, optimizer={}, settings=SETTINGS, best=None, seconds=0.0)


def test_a_full_disk_is_said_and_what_was_there_remains(run_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FILL_DISK, str(run_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in said] == [
        f"cannot write {run_path / name}" for name in ("state.pt", "best.pth", "log.csv")
    ]
    assert all("has space" in line for line in said)
    assert torch.load(run_path / "state.pt", weights_only=True)["step"] == 1
    assert {path.name for path in run_path.iterdir()} <= {".lock", "state.pt", "log.csv"}


@pytest.mark.parametrize(
    "damage",
    [
        b"3,0.1,2.\x00\x00\x00\x00\r\n",
        b"\x00" * 4096,
        b"\x00" * 4096 + b"\r\n",
        b"three,0.1,2.25\r\n",
        b"3.5,0.1,2.25\r\n",
        b"3,0.1\r\n",
        b"\r\n",
        b"\xff\xfe\r\n",
        b"4,0.1,2.125\r\n",
    ],
)
def test_damaged_rows_of_a_log_are_dropped(damage: bytes, run_path: Path) -> None:
    """And the last one, of an update that will be done again."""
    folder = RunFolder(run_path)
    (run_path / LOG).write_bytes(WELL.encode() + damage)
    folder.rewind_log(3)
    assert (run_path / LOG).read_bytes() == WELL.encode()
    folder.log(LOG, {"step": 3, "rate": 0.1, "loss": 2.0})
    assert (run_path / LOG).read_bytes() == WELL.encode() + b"3,0.1,2\r\n"


@pytest.mark.parametrize(
    ("text", "step"),
    [("", 1), ("\0" * 100, 1), ("st\0p,rate,loss\r\n1,0.1,2.5\r\n", 1), (WELL, 0)],
    ids=["empty", "zeros", "damaged names", "before the first update"],
)
def test_a_log_begins_anew(text: str, step: int, run_path: Path) -> None:
    """One without the names of its columns, and one of a run that was never saved: another's columns may differ."""
    folder = RunFolder(run_path)
    (run_path / SCORES).write_text(text)
    folder.rewind_log(step)
    folder.log(SCORES, {"step": 2, "AP": 0.5})
    assert (run_path / SCORES).read_text().splitlines() == ["step,AP", "2,0.5"]


def test_what_a_killed_run_half_wrote_is_removed(run_path: Path) -> None:
    RunFolder(run_path).close()
    for name in (".state.pt.123.tmp", ".best.pth.9.tmp", "mine.tmp"):
        (run_path / name).write_text("")
    RunFolder(run_path, alone=False)
    assert len(list(run_path.glob("*.tmp"))) == 3, "the others of a run leave them to the first"
    RunFolder(run_path)
    assert [path.name for path in run_path.glob("*.tmp")] == ["mine.tmp"]


def test_a_folder_in_the_place_of_a_log_is_said(run_path: Path) -> None:
    folder = RunFolder(run_path)
    (run_path / LOG).mkdir()
    with pytest.raises(CheckpointError, match=r"log\.csv is no file.*remove it"):
        folder.rewind_log(1)
    with pytest.raises(FpnEngineError, match=r"cannot (remove|write) .*log\.csv"):
        folder.clear()
