"""The runtime on a real GPU: no wait between image and result, right results, graphs that come and go."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fpn_engine.backends import TrunkOutput
from fpn_engine.detections import Detections
from fpn_engine.engine import Engine
from fpn_engine.pipeline import Pipeline, Thresholds
from fpn_engine.runtime.captured import CapturedRunner
from fpn_engine.runtime.cuda import make_cuda_runner
from fpn_engine.runtime.lanes import Lanes
from fpn_engine.runtime.packet import unpack_result
from fpn_engine.runtime.runner import EagerRunner
from fpn_engine.runtime.staging import SLOTS
from fpn_export.detector import FpnDetector
from tests.engine.conftest import SPEC, Pixels, make_picture
from tests.engine.runtime.conftest import make_group

pytestmark = pytest.mark.gpu
SHAPES = [(60, 80), (61, 79), (90, 50), (200, 40), (1, 1), (60, 80), (30, 40), (90, 50)]


@pytest.fixture(scope="module")
def cuda_model(model: FpnDetector) -> Iterator[FpnDetector]:
    """The small detector on the GPU, in float32 throughout."""
    allowed = exchange_tf32(False)
    yield copy.deepcopy(model).cuda()
    exchange_tf32(allowed)


def exchange_tf32(allowed: bool) -> bool:
    """Let cuDNN use TF32 or not; returns whether it might before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch warn of this interface
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = allowed
    return before


@pytest.fixture(scope="module")
def pictures() -> list[Pixels]:
    return [make_picture(*shape, seed) for seed, shape in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def expected(model: FpnDetector, pictures: list[Pixels]) -> list[Detections]:
    """What the CPU finds."""
    return Engine(model.pipeline)(pictures)


def assert_twins(found: list[Detections], expected: list[Detections]) -> None:
    """Detections of 0.5 and more have a twin on the other side: IoU 0.95, score within 0.02, the same class."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.image_size == theirs.image_size
        for one, other in ((ours, theirs), (theirs, ours)):
            sure = one.scores >= 0.5
            for box, score, label in zip(one.boxes[sure], one.scores[sure], one.labels[sure], strict=True):
                near = (abs(other.scores - score) <= 0.02) & (other.labels == label)
                assert (near & (_iou(other.boxes, box) >= 0.95)).any()
    assert sum(int((each.scores >= 0.5).sum()) for each in expected) > 0


def _iou(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    overlap = sides.clip(0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return overlap / (areas + (box[2:] - box[:2]).prod() - overlap)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any operation that waits for the GPU raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_runner(model: FpnDetector, batch_size: int = 1, memory: int | None = None) -> CapturedRunner:
    return make_cuda_runner(model.pipeline, batch_size=batch_size, graph_memory=memory)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_same_as_on_the_cpu(
    batch_size: int, cuda_model: FpnDetector, pictures: list[Pixels], expected: list[Detections]
) -> None:
    engine = Engine(cuda_model.pipeline, batch_size=batch_size)
    rounds = [engine(pictures) for _ in range(4)]  # as they are, captured, replayed
    for found in rounds:
        assert_twins(found, expected)
    for found, again in zip(rounds[-2], rounds[-1], strict=True):
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(found, name), getattr(again, name))


def test_operation_by_operation(cuda_model: FpnDetector, pictures: list[Pixels], expected: list[Detections]) -> None:
    engine = Engine(cuda_model.pipeline, graphs=False)
    assert isinstance(engine._runner, EagerRunner)
    assert_twins(engine(pictures), expected)


def test_nothing_waits_between_image_and_result(cuda_model: FpnDetector) -> None:
    runner = make_runner(cuda_model, batch_size=2)
    group, task = make_group([(60, 80), (61, 79)])
    runner.warm(group, task)
    with no_waiting():
        pending = [runner.submit(group, task) for _ in range(SLOTS)]
    counts = [each.wait().counts.tolist() for each in pending]
    assert counts[0] == counts[1] == counts[2]
    assert min(counts[0]) > 0


def test_nor_without_a_graph(cuda_model: FpnDetector) -> None:
    runner = make_runner(cuda_model)
    group, task = make_group([(60, 80)])
    runner.submit(group, task).wait()
    (entry,) = runner.graphs._entries.values()
    with torch.inference_mode(), runner._transport.computing():
        entry.line()
        with no_waiting():
            found = entry.line()
    assert int(unpack_result(found.cpu()).counts[0]) > 0


def test_the_trace_of_a_replay_shows_no_copy_to_the_host(cuda_model: FpnDetector) -> None:
    runner = make_runner(cuda_model)
    group, task = make_group([(60, 80)])
    graph = runner.capture(group, task)
    with runner._transport.computing(), profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
    names = [event.name for event in trace.events()]
    assert len([name for name in names if "reprocess" in name]) >= 5, names[:20]
    assert [name for name in names if "DtoH" in name or "HtoD" in name] == []


def test_one_copy_each_way_for_a_group(cuda_model: FpnDetector) -> None:
    runner = make_runner(cuda_model, batch_size=2)
    group, task = make_group([(60, 80), (61, 79)])
    runner.warm(group, task)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        for _ in range(4):
            runner.submit(group, task).wait()
    names = [event.name for event in trace.events()]
    assert len([name for name in names if "HtoD" in name]) == 4
    assert len([name for name in names if "DtoH" in name]) == 4


def test_the_least_recently_used_graph_goes(cuda_model: FpnDetector, pictures: list[Pixels]) -> None:
    runner = make_runner(cuda_model, memory=1)
    engine = Engine(cuda_model.pipeline, runner=runner)
    plain = Engine(cuda_model.pipeline, graphs=False)
    for picture in [pictures[0], pictures[2], pictures[3]] * 2:
        for _ in range(3):
            assert_twins(engine(picture), plain(picture))
        assert len(runner.graphs.captured) == 1


def test_memory_of_graphs_is_known_and_given_back(cuda_model: FpnDetector) -> None:
    runner = make_runner(cuda_model)
    for shape in [(90, 120), (60, 80), (90, 50)]:
        runner.warm(*make_group([shape]))
    assert runner.graphs.nbytes > 0
    before = torch.cuda.memory_reserved()
    runner.graphs.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before
    group, task = make_group([(60, 80)])
    runner.warm(group, task)
    assert int(runner.submit(group, task).wait().counts[0]) > 0


def test_memory_is_flat(cuda_model: FpnDetector, pictures: list[Pixels]) -> None:
    engine = Engine(cuda_model.pipeline, batch_size=2)
    for _ in range(4):
        engine(pictures)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(20):
        engine(pictures)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_larger_image_moves_the_ring(
    cuda_model: FpnDetector, monkeypatch: pytest.MonkeyPatch, expected: list[Detections], pictures: list[Pixels]
) -> None:
    monkeypatch.setattr("fpn_engine.runtime.captured.IMAGE_BYTES", 1000)
    engine = Engine(cuda_model.pipeline)
    for _ in range(3):
        assert_twins(engine(pictures), expected)
    large = make_picture(600, 800)
    plain = Engine(cuda_model.pipeline, graphs=False)
    for _ in range(3):
        assert_twins(engine([large, pictures[0]]), plain([large, pictures[0]]))


@pytest.mark.parametrize("lanes", [1, 2])
def test_several_threads(
    lanes: int, cuda_model: FpnDetector, pictures: list[Pixels], expected: list[Detections]
) -> None:
    engine = Engine([cuda_model.pipeline] * lanes, batch_size=2)
    assert isinstance(engine._runner, Lanes) == (lanes > 1)
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 12):  # in another order each, so that captures meet replays
                at = number % len(pictures)
                assert_twins(engine([pictures[at]]), [expected[at]])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_stream(lanes: int, cuda_model: FpnDetector, pictures: list[Pixels], expected: list[Detections]) -> None:
    engine = Engine([cuda_model.pipeline] * lanes, batch_size=2)
    paths = [str(number % len(pictures)) for number in range(50)]
    outcomes = list(engine.stream(paths, read=lambda path: pictures[int(str(path))]))
    assert [outcome.source for outcome in outcomes] == paths
    assert_twins([outcome.result for outcome in outcomes], [expected[int(path)] for path in paths])  # type: ignore[misc]


def test_proposals(cuda_model: FpnDetector, model: FpnDetector, pictures: list[Pixels]) -> None:
    engine = Engine(cuda_model.pipeline, batch_size=2)
    for _ in range(3):
        for ours, theirs in zip(engine.propose(pictures), Engine(model.pipeline).propose(pictures), strict=True):
            assert abs(len(ours.boxes) - len(theirs.boxes)) <= 1
            np.testing.assert_allclose(ours.scores[:5], theirs.scores[:5], atol=1e-3)


def test_a_thread_on_the_default_stream_is_not_in_the_way(cuda_model: FpnDetector, pictures: list[Pixels]) -> None:
    """Others may compute on the device while something is captured."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def compute() -> None:
        try:
            a = torch.randn(256, 256, device="cuda")
            while not stop.is_set():
                a = (a @ a).clamp(-1, 1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        engine = Engine(cuda_model.pipeline)
        for _ in range(3):
            engine(pictures)
    finally:
        stop.set()
        thread.join()
    assert failures == []


class Exchanging:
    """A trunk that writes into buffers of its own and takes other ones for another shape, as a backend may."""

    def __init__(self, model: FpnDetector) -> None:
        self.buffers: tuple[Tensor, ...] = ()
        self._model = model

    def __call__(self, images: Tensor, /) -> TrunkOutput:
        out = self._model.trunk(images)
        tensors = [*out.features, *out.objectness, *out.deltas]
        if [b.shape for b in self.buffers] != [t.shape for t in tensors]:
            self.buffers = tuple(torch.empty_like(t) for t in tensors)
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer.copy_(tensor)
        levels = len(out.features)
        return TrunkOutput(self.buffers[:levels], self.buffers[levels:-5], self.buffers[-5:])


def test_a_graph_keeps_the_buffers_that_it_was_captured_with(
    cuda_model: FpnDetector, pictures: list[Pixels], expected: list[Detections]
) -> None:
    pipeline = Pipeline(SPEC, Exchanging(cuda_model), cuda_model.head, cuda_model.pipeline.device)
    engine = Engine(pipeline)
    for _ in range(3):
        assert_twins(engine(pictures[0]), expected[:1])
    engine(pictures[2])  # other buffers
    torch.cuda.empty_cache()
    rubbish = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    assert_twins(engine(pictures[0]), expected[:1])
    assert len(rubbish) == 64


class Faulty:
    """A trunk to whose last map of deltas ``fault`` is added."""

    def __init__(self, model: FpnDetector) -> None:
        self.fault = torch.zeros(2, 1, 1, 1, device="cuda")
        self._model = model

    def __call__(self, images: Tensor, /) -> TrunkOutput:
        out = self._model.trunk(images)
        return out._replace(deltas=(*out.deltas[:-1], out.deltas[-1] + self.fault))


def test_the_status_of_a_replay_is_its_own(cuda_model: FpnDetector) -> None:
    """It is found on another stream than all else, in the graph a branch."""
    trunk = Faulty(cuda_model)
    pipeline = Pipeline(SPEC, trunk, cuda_model.head, cuda_model.pipeline.device)
    runner = make_cuda_runner(pipeline, batch_size=2)
    group, task = make_group([(60, 80), (61, 79)])
    runner.warm(group, task)
    for fault in ([0.0, 0.0], [0.0, torch.nan], [torch.inf, 0.0], [0.0, 0.0]) * 20:
        trunk.fault.copy_(torch.tensor(fault).view(2, 1, 1, 1))
        torch.cuda.synchronize()
        assert runner.submit(group, task).wait().status.tolist() == [int(value != 0) for value in fault]


def test_without_a_graph_the_status_waits_for_what_it_reads(cuda_model: FpnDetector) -> None:
    trunk = Faulty(cuda_model)
    pipeline = Pipeline(SPEC, trunk, cuda_model.head, cuda_model.pipeline.device)
    runner = make_cuda_runner(pipeline, batch_size=2)
    group, task = make_group([(60, 80), (61, 79)])
    runner.submit(group, task).wait()
    (entry,) = runner.graphs._entries.values()
    with torch.inference_mode(), runner._transport.computing():
        for number in range(40):
            trunk.fault.fill_(torch.nan if number % 3 == 0 else 0.0)
            found = unpack_result(entry.line().cpu())
            assert found.status.tolist() == [int(number % 3 == 0)] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one(
    model: FpnDetector, pictures: list[Pixels], expected: list[Detections]
) -> None:
    engine = Engine(copy.deepcopy(model).to("cuda:1").pipeline)
    assert engine.device == torch.device("cuda:1")
    before = torch.cuda.memory_allocated(0)
    for _ in range(3):
        assert_twins(engine(pictures), expected)
    assert torch.cuda.memory_allocated(0) == before
    assert torch.cuda.current_device() == 0


def test_the_current_device_and_stream_are_left_alone(cuda_model: FpnDetector, pictures: list[Pixels]) -> None:
    engine = Engine(cuda_model.pipeline)
    mine = torch.cuda.Stream()
    with torch.cuda.stream(mine):
        for _ in range(3):
            engine(pictures[0])
        assert torch.cuda.current_stream() == mine


def test_warming_up_leaves_nothing_for_later(cuda_model: FpnDetector) -> None:
    runner = make_runner(cuda_model, batch_size=2)
    engine = Engine(cuda_model.pipeline, batch_size=2, runner=runner)
    engine.warmup([(60, 80), (90, 50)], batches=[1, 2])
    before = runner.graphs.captured
    assert len(before) == 4
    for shape in [(60, 80), (90, 50)]:
        engine([make_picture(*shape)] * 3, score_threshold=Thresholds.of(SPEC).box_score_thresh)
    assert set(runner.graphs.captured) == set(before)
