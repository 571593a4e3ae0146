"""What every suite shares: rows saved one by one, what is taken again, what is told, and targets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import suite as suite_module
from benchmarks.rows import latest
from benchmarks.suite import Case, DeviceLostError, Effort, Measured, NotHereError, Suite, parse, run_suite
from benchmarks.targets import Target, Targets
from fpn_engine.errors import FpnEngineError

TIMED = {"milliseconds": {"median": 2.0, "p20": 1.0, "p80": 3.0, "rounds": 5}}


class Script:
    """A suite of cases whose growing rows are given; it counts what is measured."""

    def __init__(self, **cases: Any) -> None:
        self.cases, self.taken = cases, list[str]()
        self.suite = Suite(name="script", summary="", list_cases=self.list_cases)

    def list_cases(self, effort: Effort) -> list[Case]:
        def measure(name: str) -> Iterator[Measured]:
            self.taken.append(name)
            for part in self.cases[name]:
                if isinstance(part, Exception):
                    raise part
                yield Measured(part)

        return [Case(what=name, measure=lambda effort, n=name: measure(n)) for name in self.cases]  # type: ignore[misc]


def read(path: Path) -> dict[str, Any]:
    return {row["what"]: row for row in json.loads(path.read_text())}


DONE = {"contestants": {"fpn x": TIMED}, "complete": True}
PART = {"contestants": {}, "complete": False}


def test_rows_have_their_provenance_and_are_not_taken_again(tmp_path: Path) -> None:
    path, script = tmp_path / "new" / "x.json", Script(one=[PART, DONE], two=[DONE])
    assert run_suite(script.suite, ["-o", str(path)]) == 0
    rows = read(path)
    assert rows.keys() == {"one", "two"}
    assert rows["one"]["complete"]
    assert rows["one"].keys() >= {"suite", "device", "commit", "date", "command", "packages", "threads", "quick"}
    assert rows["one"]["command"] == "python -m benchmarks.bench_script -o FILE"
    assert str(tmp_path) not in path.read_text(), "no paths of the machine"
    assert run_suite(script.suite, ["-o", str(path)]) == 0
    assert script.taken == ["one", "two"]
    assert run_suite(script.suite, ["-o", str(path), "--quick", "--only", "two"]) == 0
    assert script.taken == ["one", "two", "two"], "a quick row is not the same"
    assert len(json.loads(path.read_text())) == 3


def test_what_fails_keeps_nothing_from_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    cases = {
        "wrong": [PART, AssertionError("off by one")],
        "half": [{"contestants": {"fpn a": TIMED, "fpn b": {"error": "no"}}, "complete": True}],
        "absent": [NotHereError("needs a GPU")],
        "good": [DONE],
    }
    script = Script(**cases)
    assert run_suite(script.suite, ["-o", str(path)]) == 1
    rows = read(path)
    assert not rows["wrong"]["complete"], "what it had is kept, and it is tried again"
    assert rows["absent"]["not_run"] == "needs a GPU"
    captured = capsys.readouterr()
    assert "failed: wrong; half: fpn b" in captured.err
    assert "absent: not run, needs a GPU" in captured.out
    assert run_suite(script.suite, ["-o", str(path)]) == 1
    assert script.taken == ["wrong", "half", "absent", "good", "wrong"]


def test_no_row_is_begun_after_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    assert run_suite(Script(one=[DONE]).suite, ["-o", str(path), "--minutes", "-1"]) == 0
    assert not path.exists()
    assert "out of time before one" in capsys.readouterr().err


def test_a_lost_device_goes_on_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the row in the file, so that it is not tried for ever."""
    path, commands = tmp_path / "x.json", list[list[str]]()

    def replace_process(program: str, command: list[str]) -> None:
        commands.append(command)
        raise SystemExit

    monkeypatch.setattr(suite_module, "is_device_alive", lambda device: False)
    monkeypatch.setattr("os.execv", replace_process)
    script = Script(one=[PART, DeviceLostError("bad")], two=[DONE])
    with pytest.raises(SystemExit):
        run_suite(script.suite, ["-o", str(path)])
    assert read(path)["one"]["complete"]
    assert "DeviceLostError: bad" in read(path)["one"]["error"]
    (command,) = commands
    assert command[1:3] == ["-m", "benchmarks.bench_script"]
    assert parse(script.suite, command[3:]).leave_out == ["bad"]


def test_the_newest_row_counts() -> None:
    old = {"suite": "s", "what": "w", "device": "d", "quick": False, "date": "2026-01-01", "commit": "a"}
    new, other = {**old, "date": "2026-02-01", "commit": "b"}, {**old, "device": "e"}
    assert latest([new, old, other]) == [new, other]
    assert latest([old, {**old, "commit": "c"}]) == [{**old, "commit": "c"}], "of one day the later in the file"


ROW = {
    "suite": "s",
    "what": "w",
    "device": "GPU X, 2",
    "contestants": {"a": {"ms": 3.0}, "b": {"ms": 2.0}, "c": {"not_run": "x"}},
    "sum": 5.0,
}


@pytest.mark.parametrize(
    ("bounds", "figure", "is_met"),
    [
        ({"figure": "ms", "contestants": ("a", "b"), "at_most": 2.0}, 2.0, True),
        ({"figure": "ms", "contestants": ("a", "b"), "at_least": 2.5}, 3.0, True),
        ({"figure": "ms", "contestants": ("a",), "at_most": 2.0}, 3.0, False),
        ({"figure": "sum", "at_most": 4.0}, 5.0, False),
        ({"figure": "ms", "contestants": ("c", "d"), "at_most": 4.0}, None, False),
    ],
)
def test_targets(bounds: dict[str, Any], figure: float | None, is_met: bool) -> None:
    target = Target(suite="s", what="w", **bounds)
    for device, is_here in (("GPU X", True), ("GPU Y", False)):
        (verdict,) = Targets({device: [target]}).judge([ROW])
        assert (verdict.figure, verdict.is_met, verdict.is_here) == (figure, is_met, is_here)
        assert verdict.is_failure == (is_here and figure is not None and not is_met)
    assert Targets({"GPU X": [target]}).judge([{**ROW, "quick": True}, {**ROW, "what": "other"}]) == []


def test_every_target_is_about_a_row_that_exists() -> None:
    """On the CPU, whose cases can be listed here."""
    from benchmarks.__main__ import NAMES

    named = {name: __import__(f"benchmarks.bench_{name}", fromlist=["SUITE"]).SUITE for name in NAMES}
    everything = Targets.load_all().of
    assert everything.keys() == {"NVIDIA H200", "AMD EPYC, 2 cores"}
    cases = {name: {case.what for case in suite.list_cases(Effort(every=True))} for name, suite in named.items()}
    batched = {"merge", "lateral + upsample + add, all levels, batch 8"}  # kernels' batches above 1 are a GPU's
    for target in (target for targets in everything.values() for target in targets):
        assert target.what in cases[target.suite] or target.what in batched, str(target)


@pytest.mark.parametrize(
    "content",
    ['device = "x"\n[[target]]\nsuite = "s"', 'device = "x"\n[[target]]\nwhatever = 1', "device =", 'device = "x"'],
)
def test_a_file_of_targets_with_faults_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(content)
    with pytest.raises(FpnEngineError, match=r"bad\.toml"):
        Targets.load_all(tmp_path)
