"""The captured runner on a stand-in for a GPU: right for other values than it was recorded with, and never early."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fpn_engine.errors import DeviceMemoryError
from fpn_engine.pipeline import PaddedDetections, Pipeline, Thresholds
from fpn_engine.runtime.captured import MIN_GIVEN, CapturedRunner
from fpn_engine.runtime.lanes import Lanes
from fpn_engine.runtime.runner import EagerRunner, Group, Task
from fpn_engine.runtime.staging import SLOTS
from fpn_export.detector import FpnDetector
from tests.engine.conftest import SPEC
from tests.engine.runtime.conftest import KINDS, fixed, make_group, make_model
from tests.engine.runtime.host_reads import HostReadError
from tests.engine.runtime.stand_ins import DeferredTransport, RecordingCapture

pytestmark = pytest.mark.usefixtures("atomic_ops")
LIMIT = 10**9


class Bench:
    """A runner with its stand-ins, and the answers that it should give."""

    def __init__(self, model: FpnDetector, *, batch_size: int = 1, early: bool = False, **options: Any) -> None:
        pipeline = fixed(model, **options)
        self.transport = DeferredTransport(early_uploads=early)
        self.capture = RecordingCapture(self.transport)
        self.runner = CapturedRunner(pipeline, self.transport, self.capture, batch_size=batch_size, graph_memory=LIMIT)
        self.eager = EagerRunner(pipeline)

    def check(self, group: Group, task: Task, exact: bool = True) -> None:
        assert_same(self.runner.submit(group, task).wait(), self.eager.submit(group, task).wait(), exact)


def assert_same(ours: PaddedDetections, theirs: PaddedDetections, exact: bool = True) -> None:
    assert int(theirs.counts.min()) > 0
    for name, mine, other in zip(ours._fields, ours, theirs, strict=True):
        if exact or not mine.is_floating_point():
            assert torch.equal(mine, other), name
        else:
            torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("early", [False, True])
def test_replays_are_right_for_other_images(early: bool, model: FpnDetector) -> None:
    bench = Bench(model, early=early)
    for seed, shape in enumerate([(60, 80), (61, 79), (30, 40), (90, 120), (60, 80)]):  # all padded to 64 x 96
        bench.check(*make_group([shape], seed))
    assert bench.capture.captures == 1
    assert bench.capture.live[0].replays == 4
    assert bench.transport.log.count("launch") == 1


@pytest.mark.parametrize("early", [False, True])
def test_groups_under_way_do_not_meet(early: bool, model: FpnDetector) -> None:
    bench = Bench(model, early=early)
    given = [make_group([(60 + seed, 80)], seed) for seed in range(3)]
    for group, task in given[:2]:
        bench.check(group, task)
    pending = [bench.runner.submit(*given[number % 3]) for number in range(8)]
    for number in (7, 0, 3, 1, 6, 2, 5, 4):
        assert_same(pending[number].wait(), bench.eager.submit(*given[number % 3]).wait())


def test_nothing_waits_while_there_is_room(model: FpnDetector) -> None:
    bench = Bench(model)
    group, task = make_group([(60, 80)])
    bench.runner.warm(group, task)
    bench.transport.drain()
    waits = bench.transport.waits
    bench.transport.log.clear()
    for _ in range(SLOTS):
        bench.runner.submit(group, task)
    assert bench.transport.waits == waits
    assert bench.transport.log == ["upload", "copy", "replay", "download"] * SLOTS
    assert bench.transport.queued == 4 * SLOTS


@pytest.mark.parametrize("early", [False, True])
def test_pixels_on_the_device_need_no_upload(early: bool, model: FpnDetector) -> None:
    """In planes, as a decoder leaves them, beside images from the host in any order."""
    bench = Bench(model, batch_size=4, early=early)
    for seed, on_device in enumerate([(0, 1, 2), (0, 1, 2), (1,), (0, 2), ()]):
        group, task = make_group([(60, 80), (61, 79), (90, 120)], seed)
        images = [
            torch.from_numpy(image.transpose(2, 0, 1).copy()).permute(1, 2, 0) if row in on_device else image
            for row, image in enumerate(group.images)
        ]
        bench.transport.log.clear()
        found = bench.runner.submit(group._replace(images=images), task).wait()
        expected = bench.eager.submit(group, task).wait()
        assert_same(found, expected, exact=False)
        assert_same(bench.eager.submit(group._replace(images=images), task).wait(), expected)
        assert bench.transport.log.count("place") == len(on_device)
        assert bench.transport.log.count("upload") == 1
    assert bench.capture.captures == 1


@pytest.mark.parametrize("kind", ["fast_rcnn", "rpn"])
def test_other_systems(kind: str) -> None:
    bench = Bench(make_model(KINDS[kind]))
    boxes = 5 if kind == "fast_rcnn" else None
    for seed in range(3):
        group, task = make_group([(60, 80)], seed, boxes=None if boxes is None else boxes + seed)
        ours = bench.runner.submit(group, task).wait()
        assert_same(ours, bench.eager.submit(group, task).wait(), exact=False)
    assert bench.capture.captures == 1
    if boxes:
        many, task = make_group([(60, 80)], boxes=MIN_GIVEN + 1)
        bench.check(many, task, exact=False)  # more than the graph has room for: another graph
        assert bench.transport.log.count("launch") == 2


def test_proposals_alone(model: FpnDetector) -> None:
    bench = Bench(model)
    for seed in range(3):
        group, task = make_group([(60, 80)], seed)
        bench.check(group, Task(padded_size=task.padded_size, thresholds=None))
        bench.check(group, task)
    assert bench.capture.captures == 2


def test_thresholds_have_graphs_of_their_own(model: FpnDetector) -> None:
    bench = Bench(model)
    group, task = make_group([(60, 80)])
    for score in (0.05, 0.5, 0.05, 0.5):
        thresholds = Thresholds.of(SPEC).override(box_score_thresh=score)
        bench.check(group, Task(padded_size=task.padded_size, thresholds=thresholds))
    assert bench.capture.captures == 2


@pytest.mark.parametrize(("batch_size", "graphs"), [(4, {1, 2, 4}), (3, {1, 2, 3})])
def test_partial_batches_are_filled_up(batch_size: int, graphs: set[int], model: FpnDetector) -> None:
    bench = Bench(model, batch_size=batch_size)
    for number in range(1, batch_size + 1):
        for seed in range(2):
            group, task = make_group([(60, 80), (61, 79), (30, 40), (90, 120)][:number], seed)
            found = bench.runner.submit(group, task).wait()
            assert len(found.counts) == number
            assert_same(found, bench.eager.submit(group, task).wait(), exact=False)
    assert {form.batch for form, _ in bench.runner.graphs.captured} == graphs  # type: ignore[misc]


def test_an_image_larger_than_the_ring(model: FpnDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpn_engine.runtime.captured.IMAGE_BYTES", 20_000)
    bench = Bench(model)
    small, large = make_group([(60, 80)]), make_group([(120, 160)], 1)
    for _ in range(2):
        bench.check(*small)
    assert bench.capture.captures == 1
    pending = bench.runner.submit(*small)
    bench.check(*large)
    assert bench.runner.graphs.captured == []  # what was captured had another address
    assert_same(pending.wait(), bench.eager.submit(*small).wait())
    for given in (small, large, small, large):
        bench.check(*given)
    assert bench.capture.captures == 2


def test_no_memory_gives_the_graphs_up_and_tries_once_more(model: FpnDetector) -> None:
    bench = Bench(model)
    group, task = make_group([(60, 80)])
    for _ in range(2):
        bench.check(group, task)
    other = make_group([(90, 50)])
    bench.transport.failure = DeviceMemoryError("full")
    bench.check(*other)
    assert "release" in bench.transport.log
    assert bench.capture.live == []
    bench.check(group, task)


def test_no_memory_at_all_is_said(model: FpnDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(model)
    group, task = make_group([(60, 80)])

    def refuse(run: object) -> torch.Tensor:
        raise DeviceMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(bench.runner.graphs, "_launch", refuse)
        with pytest.raises(DeviceMemoryError):
            bench.runner.submit(group, task)
    bench.check(group, task)


def test_what_reads_values_cannot_be_captured(model: FpnDetector) -> None:
    bench = Bench(model, fixed_shapes=False)
    group, task = make_group([(60, 80)])
    bench.runner.submit(group, task).wait()
    with pytest.raises(HostReadError):
        bench.runner.submit(group, task)


def test_a_stale_value_would_be_seen(model: FpnDetector) -> None:
    """The stand-in repeats no Python: a size that was taken at capture stays, and the result is wrong."""

    class Stale(Pipeline):
        def preprocess(self, packed: Any, image_sizes: torch.Tensor, padded_size: tuple[int, int]) -> torch.Tensor:
            h, w = image_sizes[0].tolist()  # which on the CPU is no operator that the mode would see
            sizes = torch.stack([torch.full_like(image_sizes[:, 0], side) for side in (h, w)], dim=1)
            return super().preprocess(packed, sizes, padded_size)

    bench = Bench(model)
    bench.runner._pipeline = Stale(SPEC, model.trunk, model.head, fixed_shapes=True)
    for _ in range(2):
        bench.check(*make_group([(60, 80)]))
    with pytest.raises(AssertionError):
        bench.check(*make_group([(60, 64)]))


def test_the_graph_of_a_group(model: FpnDetector) -> None:
    bench = Bench(model)
    group, task = make_group([(60, 80)])
    graph = bench.runner.capture(group, task)
    with torch.inference_mode():
        graph.output.zero_()
    graph.replay()
    bench.transport.drain()
    assert int(graph.output[0, 0]) == int(bench.eager.submit(group, task).wait().counts[0])


@pytest.mark.parametrize("lanes", [1, 2])
def test_several_threads(lanes: int, model: FpnDetector) -> None:
    benches = [Bench(model) for _ in range(lanes)]
    runner = Lanes([bench.runner for bench in benches])
    given = [make_group([shape], seed) for seed, shape in enumerate([(60, 80), (90, 50), (61, 79)])]
    expected = [benches[0].eager.submit(*each).wait() for each in given]
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 6):
                assert_same(runner.submit(*given[number % 3]).wait(), expected[number % 3])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(bench.capture.captures <= 2 for bench in benches)
    assert sum(bench.transport.log.count("upload") for bench in benches) == 24


def test_lanes_take_turns_and_are_all_warmed(model: FpnDetector) -> None:
    benches = [Bench(model) for _ in range(2)]
    lanes = Lanes([bench.runner for bench in benches])
    assert lanes.depth == 2 * SLOTS
    group, task = make_group([(60, 80)])
    lanes.warm(group, task)
    assert [bench.capture.captures for bench in benches] == [1, 1]
    for _ in range(4):
        lanes.submit(group, task).wait()
    assert [bench.capture.live[0].replays for bench in benches] == [3, 3]
