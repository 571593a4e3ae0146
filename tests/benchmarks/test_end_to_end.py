"""benchmarks.end_to_end: the whole of it on the CPU, and what becomes of contestants that fail."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.detector_stages import count_floors
from benchmarks.detectors import BASE, Contestant, Scene, check, load_eager_parts, make_eager_parts, replay_captured
from benchmarks.end_to_end import DeviceLostError, compare, go_on, list_work, make_rows, make_scene
from benchmarks.timing import LEAST_ROUNDS, take_turns
from fpn_engine.pipeline import Pipeline
from fpn_engine.runtime.captured import CapturedRunner
from fpn_export.onnx_cost import HEAD
from tests.engine.runtime.conftest import atomic_ops
from tests.engine.runtime.stand_ins import DeferredEvent, DeferredTransport, RecordingCapture
from tests.parity.torchvision_oracle import Found, match

__all__ = ["atomic_ops"]

STAGES = ["preprocess", "trunk", "proposals", "RoIAlign", "box head", "final selection and NMS"]


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene("resnet18", 2, 0.0, True)


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a smoke run."""
    path = tmp_path_factory.mktemp("results") / "end_to_end.json"
    assert end_to_end.main(["-o", str(path), "--smoke"]) == 0
    return path


def test_smoke(taken: Path) -> None:
    rows = json.loads(taken.read_text())
    assert [row["complete"] for row in rows] == [True] * 2
    first, stages = rows
    for row in rows:
        assert (row["batch"], row["size"]) == (2, [160, 224])
    assert len(first["contestants"]) == 5
    for name, spent in first["contestants"].items():
        assert spent["rounds"] == 2, name
        assert 0 < spent["p20_us"] <= spent["median_us"] <= spent["p80_us"]
        assert spent["images_per_s"] == pytest.approx(2 / spent["median_us"] * 1e6, rel=0.02, abs=0.06)
        assert spent["agreement"]["detections"] > 20
        exact = "fp32" in name
        assert spent["agreement"]["share_with_twins"] >= (0.99 if exact else 0.4)
        assert ("largest_corner_difference_px" in spent["agreement"]) == exact
    assert "targets_on_an_H200" not in first, "they are for another size"
    assert list(stages["stages"]) == STAGES
    assert stages["sum_us"] == pytest.approx(sum(spent["median_us"] for spent in stages["stages"].values()), rel=1e-3)
    assert {"command", "date", "commit", "device", "packages"} <= first.keys() & stages.keys()


def test_what_is_there_is_not_taken_again(taken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("taken again")

    for name in ("make_rows", "make_stage_row"):
        monkeypatch.setattr(end_to_end, name, fail)
    before = taken.read_bytes()
    assert end_to_end.main(["-o", str(taken), "--smoke"]) == 0
    assert taken.read_bytes() == before
    rows = json.loads(before)
    rows[1]["complete"] = False
    taken.write_text(json.dumps(rows))
    assert end_to_end.main(["-o", str(taken), "--smoke"]) == 1, "an incomplete row is tried again"
    taken.write_bytes(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the time of the benchmark")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        end_to_end.main(["-o", str(tmp_path / "x.json")])
    assert stop.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_row_is_begun_after_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    assert end_to_end.main(["-o", str(path), "--smoke", "--minutes", "-1"]) == 0
    assert not path.exists()
    assert "out of time" in capsys.readouterr().err


def idle(scene: Scene) -> Contestant:
    found = list(scene.expected.values())  # of the first and the last, which of two are all
    return Contestant(turn=("call", lambda number: None, lambda: None), detect=lambda number: found, is_exact=False)


def broken(scene: Scene) -> Contestant:
    raise RuntimeError("does not compile\nat length")


def grow(scene: Scene, monkeypatch: pytest.MonkeyPatch, *groups: dict[str, Callable[[Scene], Contestant]]) -> list[Any]:
    """Copies of the growing row."""
    monkeypatch.setattr(end_to_end, "list_contestants", lambda device, compiled: list(groups))
    options: dict[str, Any] = {"rounds": 2, "left_out": ["absent"], "compiled": "parts", "is_over": lambda: False}
    return [json.loads(json.dumps(part)) for part in make_rows(scene, **options)]


def test_one_that_fails_is_in_the_row_with_its_error(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = grow(scene, monkeypatch, {BASE: idle, "bad": broken}, {"absent": broken, "good": idle})
    assert [row["complete"] for row in rows] == [False, True]
    assert rows[0]["contestants"]["bad"] == {"error": "RuntimeError: does not compile"}
    assert rows[1]["contestants"]["absent"] == {"error": "left out"}
    assert "median_us" in rows[0]["contestants"][BASE]
    assert rows[1]["contestants"]["good"].keys() >= {"median_us", "ratio_to_torchvision_fp32"}


def test_a_lost_device_keeps_what_was_measured(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "is_device_alive", lambda device: False)
    monkeypatch.setattr(end_to_end, "list_contestants", lambda device, compiled: [{BASE: idle}, {"bad": broken}])
    rows = make_rows(scene, rounds=2, left_out=[], compiled="parts", is_over=lambda: False)
    assert "median_us" in next(rows)["contestants"][BASE]
    last = next(rows)["contestants"]
    assert "median_us" in last[BASE]
    assert "error" in last["bad"]
    with pytest.raises(DeviceLostError, match="bad"):
        next(rows)
    assert end_to_end.parse(go_on(["-o", "x", "--smoke", "--minutes", "9"], 1.5, ["bad", "worse"])[3:]) == (
        end_to_end.parse(["-o", "x", "--smoke", "--minutes", "1.5", "--leave-out", "bad", "--leave-out", "worse"])
    )


def test_the_command_goes_on_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the row in the file, so that it is not tried for ever."""
    path, commands = tmp_path / "x.json", []

    def replace_process(program: str, command: list[str]) -> None:
        commands.append(command)
        raise SystemExit

    monkeypatch.setattr(end_to_end, "is_device_alive", lambda device: False)
    monkeypatch.setattr(end_to_end, "list_contestants", lambda device, compiled: [{BASE: idle}, {"bad": broken}])
    monkeypatch.setattr("os.execv", replace_process)
    with pytest.raises(SystemExit):
        end_to_end.main(["-o", str(path), "--smoke"])
    assert commands[0][-2:] == ["--leave-out", "bad"]
    [row] = json.loads(path.read_text())
    assert row["complete"]
    assert "median_us" in row["contestants"][BASE]


def test_wrong_results_are_not_timed(scene: Scene) -> None:
    right = make_eager_parts(scene)
    agreement = check(scene, right)
    assert agreement["share_with_twins"] == 1.0
    found = right.detect(0)

    def moved(by: float) -> Contestant:
        others = [Found(each.boxes + by, each.scores, each.labels) for each in found]
        return dataclasses.replace(right, detect=lambda number: others)

    with pytest.raises(AssertionError, match="torchvision does not find"):
        check(scene, moved(1.0))
    low = check(scene, dataclasses.replace(moved(1.0), is_exact=False))
    assert low["share_with_twins"] >= 0.9, "that much is within the bounds of a lower precision"
    with pytest.raises(AssertionError, match="have a twin"):
        check(scene, dataclasses.replace(moved(30.0), is_exact=False))


class PromptTransport(DeferredTransport):
    """Everything is done when it is given."""

    def give(self, name: str, work: Callable[[], Any]) -> DeferredEvent:
        event = super().give(name, work)
        self.drain()
        return event


@pytest.mark.usefixtures("atomic_ops")
def test_what_is_replayed_is_what_was_uploaded(scene: Scene) -> None:
    """On a stand-in for the GPU's graphs."""
    trunk, head = load_eager_parts(scene)
    transport = PromptTransport()
    capture = RecordingCapture(transport)
    pipeline = Pipeline(scene.spec, trunk, head, fixed_shapes=True)
    runner = CapturedRunner(pipeline, transport, capture, batch_size=scene.batch, graph_memory=10**9)
    captured, plain = replay_captured(scene, runner, is_exact=True), make_eager_parts(scene)
    assert check(scene, captured)["share_with_twins"] == 1.0
    for number in (1, 0, 3):
        for ours, theirs in zip(captured.detect(number), plain.detect(number), strict=True):
            assert len(match(ours, theirs)[0]) == len(theirs.scores) > 10
    (graph,) = capture.live
    how, load, run = captured.turn
    load(1)
    before = graph.replays
    run()
    assert (how, graph.replays) == ("graph", before + 1)


def test_ratios() -> None:
    rows: dict[str, Any] = {
        BASE: {"median_us": 8e3},
        "torchvision other": {"median_us": 4e3},
        "ours": {"median_us": 1e3},
    }
    rows = compare({**rows, "bad": {"error": "x"}}, batch=2)
    assert rows["ours"] == {
        "median_us": 1e3,
        "images_per_s": 2000.0,
        "ratio_to_torchvision_fp32": 0.125,
        "ratio_to_fastest_torchvision": 0.25,
    }
    assert rows["bad"] == {"error": "x"}


def test_rows_with_a_target_come_first() -> None:
    work = list_work(["resnet50", "resnet101"], [1, 8, 16, 32, 64], (800, 1216))
    order = [(kind, arch, batch) for kind, arch, batch, _ in work]
    assert order[:5] == [
        ("end_to_end", "resnet50", 1),
        ("stages", "resnet50", 1),
        ("end_to_end", "resnet50", 16),
        ("end_to_end", "resnet101", 1),
        ("stages", "resnet101", 1),
    ]
    assert len(set(order)) == len(order) == 14
    assert len({what for *_, what in work}) == 14


def test_floors(scene: Scene) -> None:
    floors = count_floors(scene, 2)
    assert floors.keys() >= {"preprocess", "trunk", "RoIAlign", HEAD, "stem", "c5"}
    parts = sum(us for name, us in floors.items() if name not in ("preprocess", "trunk", "RoIAlign", HEAD))
    assert math.isclose(floors["trunk"], parts, abs_tol=0.1)
    assert floors["preprocess"] == pytest.approx(2 * 160 * 224 * 3 * 3 / 4.3e6, abs=0.01)


def test_stages_of_pytorchs_parts_where_the_native_ones_fail(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("no such layer")

    monkeypatch.setattr(end_to_end, "load_native_parts", fail)
    row = end_to_end.make_stage_row(scene, 1)
    assert (row["parts"], row["error_of_native"]) == ("PyTorch's fp32", "ValueError: no such layer")
    assert list(row["stages"]) == STAGES


def test_few_rounds_are_enough_when_time_is_up() -> None:
    calls: list[int] = []
    turns = {"one": ("call", calls.append, lambda: None)}
    assert take_turns(turns, "cpu", rounds=50, seconds=0.0)["one"]["rounds"] == LEAST_ROUNDS
    assert calls == list(range(LEAST_ROUNDS))
