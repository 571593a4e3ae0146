"""python -m benchmarks: suites that stand in for the real ones, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.__main__ import SUITES, Suite, main

GOOD = """
import json, sys
from pathlib import Path
Path(sys.argv[2]).write_text(json.dumps(sys.argv[3:]))
"""


@pytest.fixture
def suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Suite]:
    sources = {"good": GOOD, "bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)", "late": GOOD}
    for name, source in sources.items():
        (tmp_path / f"stand_in_{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return {name: Suite(module=f"stand_in_{name}", what="", weight=1.0, needs_gpu=name == "late") for name in sources}


def test_all_are_run_and_failures_told(
    suites: dict[str, Suite], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results"
    assert main(["--all", "-o", str(output), "--minutes", "0.1"], suites, has_gpu=True) == 1
    err = capfd.readouterr().err
    assert [line.partition(",")[0] for line in err.splitlines()] == [
        "failed: bad: exit code 3",
        "failed: slow: stopped after 0.0 minutes; what it had measured is saved",
    ]
    good, late = (json.loads((output / f"{name}.json").read_text()) for name in ("good", "late"))
    assert good[0] == late[0] == "--minutes"
    assert float(good[1]) == pytest.approx(0.75 * 0.1 / 4, rel=0.1)
    assert float(late[1]) > float(good[1]), "time that others leave is for the later ones"


def test_without_a_gpu_some_are_left_out(
    suites: dict[str, Suite], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = {name: suites[name] for name in ("good", "late")}
    assert main(["--all", "-o", str(tmp_path), "--minutes", "1"], chosen, has_gpu=False) == 0
    assert "late is left out" in capfd.readouterr().out
    assert (tmp_path / "good.json").exists()
    assert not (tmp_path / "late.json").exists()


def test_alone_it_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for name, suite in SUITES.items():
        assert name in out
        assert importlib.util.find_spec(suite.module)


def test_it_needs_a_folder() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--all"])
    assert stop.value.code == 2
