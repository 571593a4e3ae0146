"""Whole detectors in turns: a contest on the CPU, and what becomes of contestants that fail."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import contest
from benchmarks.contest import Contest, find_floors
from benchmarks.ours import load_eager_parts, make_eager_parts, make_ours, replay_captured
from benchmarks.rivals import list_base
from benchmarks.roofline import count_floors
from benchmarks.scene import QUICK_SIZE, Contestant, Scene, check, make_scene
from benchmarks.suite import BASE, DeviceLostError, Effort, NotHereError
from fpn_engine.pipeline import Pipeline
from fpn_engine.roofline import Peaks
from fpn_engine.ruler import Turn
from fpn_engine.runtime.captured import CapturedRunner
from fpn_export.onnx_cost import HEAD
from tests.engine.runtime.conftest import atomic_ops
from tests.engine.runtime.stand_ins import DeferredEvent, DeferredTransport, RecordingCapture
from tests.parity.torchvision_oracle import Found, match

__all__ = ["atomic_ops"]

QUICK = Effort(quick=True)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene("resnet18", 2, QUICK_SIZE, torch.device("cpu"), quick=True)


def idle(scene: Scene) -> Contestant:
    found = list(scene.expected.values())  # of the first and the last, which of two are all
    return Contestant(
        turn=Turn("call", lambda number: None, lambda: None), detect=lambda number: found, precision="fp16"
    )


def broken(scene: Scene) -> Contestant:
    raise RuntimeError("does not compile\nat length")


def absent(scene: Scene) -> Contestant:
    raise NotHereError("needs another machine")


def grow(scene: Scene, *groups: dict[str, Callable[[Scene], Contestant]]) -> list[Any]:
    """Copies of the growing row."""
    effort = dataclasses.replace(QUICK, left_out=["left"])
    return [json.loads(json.dumps(measured.row)) for measured in Contest(scene, groups, effort).grow()]


def test_a_row_has_times_ratios_and_floors(scene: Scene) -> None:
    native = lambda each: make_ours(each, "native", "fp32")  # noqa: E731
    (row,) = grow(scene, {**list_base(), "fpn-engine, native fp32": native})
    assert row["complete"]
    assert (row["batch"], row["size"]) == (2, [160, 224])
    assert row["peaks"].keys() == {"fp32"}
    for name, about in row["contestants"].items():
        spent = about["milliseconds"]
        assert spent["rounds"] == 2, name
        assert 0 < spent["p20"] <= spent["median"] <= spent["p80"]
        assert about["images_per_s"] == pytest.approx(2e3 / spent["median"], rel=1e-2)
        assert about["agreement"]["detections"] > 20
        assert about["agreement"]["share_with_twins"] >= 0.99
        assert about["share_of_floor"] == pytest.approx(about["floor_ms"] / spent["median"], rel=0.01)
    assert row["contestants"][BASE]["ratio_to_torchvision_fp32"] == 1.0


def test_one_that_fails_is_in_the_row_with_its_error(scene: Scene) -> None:
    rows = grow(scene, {BASE: idle, "bad": broken}, {"left": broken, "good": idle, "absent": absent})
    assert [row["complete"] for row in rows] == [False, True]
    assert rows[0]["contestants"]["bad"] == {"error": "RuntimeError: does not compile"}
    assert rows[1]["contestants"]["left"] == {"error": contest.LEFT_OUT}
    assert rows[1]["contestants"]["absent"] == {"not_run": "needs another machine"}
    assert "milliseconds" in rows[0]["contestants"][BASE]
    good = rows[1]["contestants"]["good"]
    assert good.keys() >= {"milliseconds", "ratio_to_torchvision_fp32", "floor_ms"}
    assert rows[1]["peaks"].keys() == {"fp16"}, "floors of later groups too"


def test_what_a_later_group_needs_is_not_begun_when_time_is_up(scene: Scene) -> None:
    effort = dataclasses.replace(QUICK, is_over=lambda: True)
    rows = [measured.row["complete"] for measured in Contest(scene, [{BASE: idle}, {"late": broken}], effort).grow()]
    assert rows == [False]


def test_a_lost_device_keeps_what_was_measured(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "is_device_alive", lambda device: False)
    rows = Contest(scene, [{BASE: idle}, {"bad": broken}], QUICK).grow()
    assert "milliseconds" in next(rows).row["contestants"][BASE]
    last = next(rows).row["contestants"]
    assert "milliseconds" in last[BASE]
    assert "error" in last["bad"]
    with pytest.raises(DeviceLostError, match="bad"):
        next(rows)


@pytest.mark.parametrize(
    ("backend", "precision", "words"),
    [
        ("tensorrt", "fp16", "needs an NVIDIA GPU"),
        ("native", "fp16", "computes fp16 in float32"),
        ("native", "fp4", "no precision 'fp4'"),
    ],
)
def test_what_cannot_be_had_says_why(scene: Scene, backend: str, precision: str, words: str) -> None:
    with pytest.raises(NotHereError, match=words):
        make_ours(scene, backend, precision)


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
    low = check(scene, dataclasses.replace(moved(1.0), precision="bf16", maps=None))
    assert low["share_with_twins"] >= 0.9, "that much is within the bounds of a lower precision"
    with pytest.raises(AssertionError, match="have a twin"):
        check(scene, dataclasses.replace(moved(30.0), precision="bf16", maps=None))


@pytest.mark.parametrize(("scale", "is_right"), [(1.01, True), (1.5, False), (float("nan"), False)])
def test_maps_tell_right_from_wrong_where_detections_do_not(scene: Scene, scale: float, is_right: bool) -> None:
    right = make_eager_parts(scene)
    assert right.maps is not None
    maps = [level * scale for level in right.maps()]
    other = dataclasses.replace(right, precision="bf16", maps=lambda: maps)
    if is_right:
        assert check(scene, other)["relative_error_of_maps"] == pytest.approx(0.01, rel=0.1)
    else:
        with pytest.raises(AssertionError, match="feature maps are off"):
            check(scene, other)


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
    captured, plain = replay_captured(scene, runner, "fp32"), make_eager_parts(scene)
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


def test_floors(scene: Scene) -> None:
    peaks = Peaks(flops=790e12, bandwidth=4.3e12)
    floors = count_floors(scene.subject.onnx_model, scene.spec, scene.size, 2, 2, peaks)
    assert floors.stages.keys() == {"preprocess", "trunk", "RoIAlign", HEAD}
    assert floors.parts.keys() >= {HEAD, "stem", "c5"}
    trunk = sum(spent for name, spent in floors.parts.items() if name != HEAD)
    assert math.isclose(floors.stages["trunk"], trunk, rel_tol=1e-3)
    assert floors.stages["preprocess"] == pytest.approx(1e3 * 2 * 160 * 224 * 3 * 3 / 4.3e12, rel=1e-3)
    assert floors.beside(2 * floors.whole)["share_of_floor"] == 0.5
    slower = count_floors(scene.subject.onnx_model, scene.spec, scene.size, 2, 4, peaks)
    assert slower.stages["RoIAlign"] == pytest.approx(2 * floors.stages["RoIAlign"], rel=1e-3)
    assert slower.macs == floors.macs
    assert find_floors(scene, "fp32", quick=True).macs == floors.macs
