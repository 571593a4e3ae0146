"""``pytest benchmarks/ --quick`` as typed: every suite measures, saves and shows rows on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import NAMES
from benchmarks.report import read_results
from benchmarks.report.page import write_markdown, write_page

ROOT = Path(__file__).parents[2]
SECONDS = 1500.0  # on a busy machine; a quiet one needs about 60


pytestmark = pytest.mark.timeout(SECONDS + 60)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("quick") / "rows.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--quick", "--rows", str(path), "-q"]
    # One thread: tiny tensors gain nothing from more, which wait for each other.
    # The one outside may be parallel, which is not for measuring.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**outer, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [*command, "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Rounds" in done.stdout, "the table of pytest-benchmark"
    return read_results([path])


def test_every_suite_has_its_turn(rows: list[dict[str, Any]]) -> None:
    assert {row["suite"] for row in rows} == set(NAMES)
    for row in rows:
        assert row["quick"]
        assert row["complete"]
        assert row.keys() >= {"command", "date", "commit", "device", "threads", "python", "packages"}


def test_what_is_measured_and_what_is_not(rows: list[dict[str, Any]]) -> None:
    by_suite = {name: [row for row in rows if row["suite"] == name] for name in NAMES}
    (peers,) = by_suite["peers"]
    assert "milliseconds" in peers["contestants"]["ONNX Runtime on torchvision's export fp32"]
    assert peers["contestants"]["fpn-engine, tensorrt fp16"]["not_run"] == "needs an NVIDIA GPU and TensorRT"
    exact = [about for about in peers["contestants"].values() if about.get("precision") == "fp32"]
    assert len(exact) >= 4
    assert all(about["agreement"]["share_with_twins"] >= 0.99 for about in exact)
    assert [row["not_run"] for row in by_suite["engine"] if "not_run" in row] == [
        "takes too long on a CPU; --largest-batch 99 runs it"
    ]
    (stages,) = (row for row in by_suite["stages"] if "stages" in row)
    assert sum(each["milliseconds"]["median"] for each in stages["stages"].values()) == pytest.approx(
        stages["sum_ms"], rel=1e-2
    )
    assert 0 < stages["share_outside_network"] < 1
    scaling = {row["axis"]: row for row in by_suite["scaling"]}
    assert scaling.keys() == {"boxes", "RoIs", "classes", "image area", "batch"}
    assert all(len(row["points"]) == 3 for row in scaling.values())
    infer = next(row for row in by_suite["cold"] if row["what"].startswith("fpn-engine infer"))
    (about,) = infer["contestants"].values()
    spent = about["milliseconds"]["median"]
    assert about["overhead_ms"] == pytest.approx(spent - about["warm_detection_ms"], rel=0.01)


def test_a_report_of_them(rows: list[dict[str, Any]]) -> None:
    page = write_page(rows)
    assert "They are no measurements" in page
    for row in rows:
        if "not_run" not in row and row["suite"] != "paper":
            assert row["what"] in page
    assert "## " in write_markdown(rows)
