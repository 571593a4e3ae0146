"""python -m benchmarks: suites that stand in for the real ones, each in a process of its own; targets and errors."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, Command, main

GOOD = """
import json, sys
from pathlib import Path
path = Path(sys.argv[2])
rows = json.loads(path.read_text()) if path.exists() else []
path.write_text(json.dumps([*rows, {"argv": sys.argv[3:], "suite": "x", "what": "y", "device": "z"}]))
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Command]:
    sources = {"good": GOOD, "bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)", "late": GOOD}
    for name, source in sources.items():
        (tmp_path / f"stand_in_{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return {name: Command(module=f"stand_in_{name}", summary=f"all about {name}") for name in sources}


def test_all_are_run_and_failures_told(
    commands: dict[str, Command], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "here.json"
    assert main(["--all", "-o", str(output), "--minutes", "0.1"], commands) == 1
    err = capfd.readouterr().err
    assert [line.partition(",")[0] for line in err.splitlines()] == [
        "failed: bad: exit code 3",
        "failed: slow: stopped after 0.0 minutes; what it had measured is saved",
    ]
    good, late = (row["argv"] for row in json.loads(output.read_text()))
    assert good[:2] == late[:2] == ["--all", "--minutes"]
    assert float(good[2]) == pytest.approx(0.8 * 0.1 / 4, rel=0.1)
    assert float(late[2]) > float(good[2]), "time that others leave is for the later ones"


def test_some_of_them(commands: dict[str, Command], tmp_path: Path) -> None:
    output = tmp_path / "here.json"
    assert main(["-o", str(output), "--quick", "--only", "late"], commands) == 0
    [row] = json.loads(output.read_text())
    assert row["argv"][0] == "--quick"


@pytest.mark.parametrize("folder", ["results/", "deep/results/", "there", "there/"])
def test_in_a_folder_the_file_is_named_after_the_device(
    folder: str, commands: dict[str, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    monkeypatch.setattr("fpn_engine.provenance._device", lambda: "NVIDIA H200 (x), 2 cores")
    assert main(["--all", "-o", folder, "--only", "late"], commands) == 0
    (found,) = (tmp_path / folder).iterdir()
    assert found.name == "nvidia-h200-x-2-cores.json"
    [row] = json.loads(found.read_text())
    assert row["argv"][0] == "--all"


def test_wrong_usage(commands: dict[str, Command], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--only", "nosuch"], commands)
    assert stop.value.code == 2
    assert "there is no suite nosuch" in capsys.readouterr().err


def test_alone_it_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for name in NAMES:
        assert f"{name} " in out
    found = {path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("bench_*.py")}
    assert found == {f"bench_{name}" for name in NAMES}, "no suite is forgotten"
    for name in NAMES:
        assert importlib.import_module(f"benchmarks.bench_{name}").SUITE.name == name


def make_row(device: str, ratio: float) -> dict[str, object]:
    contestant = {"fpn-engine, native fp32": {"ratio_to_torchvision_fp32": ratio}}
    row = {"suite": "peers", "what": "R50-FPN, 800x1216, batch 1", "complete": True, "quick": False, "commit": "c"}
    return {**row, "device": device, "contestants": contestant}


@pytest.mark.parametrize(
    ("device", "ratio", "code", "words"),
    [
        ("AMD EPYC, 2 cores", 0.61, 0, "met: peers"),
        ("AMD EPYC, 2 cores", 0.63, 1, "missed: peers"),
        ("Another CPU", 0.63, 0, "missed: peers"),
    ],
)
def test_a_missed_target_fails_where_it_is_for(
    device: str, ratio: float, code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "here.json"
    output.write_text(json.dumps([make_row(device, ratio)]))
    assert main(["-o", str(output)], {}) == code
    captured = capsys.readouterr()
    assert words in captured.out
    assert ("for information" in captured.out) == (device == "Another CPU")
    assert ("failed: target missed" in captured.err) == bool(code)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read"), ("{", "is not JSON"), ("{}", "not an array of rows"), ("[]", "no rows of suites")],
)
def test_a_report_of_no_results(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "x.json"
    if content is not None:
        results.write_text(content)
    assert main(["report", str(results), "-o", str(tmp_path / "r.html")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "r.html").exists()
