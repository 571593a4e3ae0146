"""The engine around its runner: order, overlap, memory that runs out, threads, warm-up, options."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from fpn_engine.batching import make_batches
from fpn_engine.buckets import Buckets
from fpn_engine.detections import Detections
from fpn_engine.engine import Engine
from fpn_engine.errors import BackendError, DeviceMemoryError, FpnEngineError, ImageError, OptionError
from fpn_engine.pipeline import Pipeline
from fpn_engine.plan import read_plan
from fpn_engine.runtime.captured import CapturedRunner
from fpn_engine.runtime.lanes import Lanes
from fpn_engine.runtime.runner import EagerRunner
from fpn_engine.runtime.staging import SLOTS
from fpn_engine.tasks import Group, PaddedDetections, Pending, Ready, Task
from fpn_export.detector import FpnDetector
from tests.engine.conftest import SPEC, Pixels, Run, Tiny, make_picture, save_picture
from tests.engine.runtime.conftest import fixed
from tests.engine.runtime.stand_ins import DeferredTransport, RecordingCapture
from tests.engine.test_engine import assert_same
from tests.engine.test_reading import count_threads

SHAPES = [(60, 80), (61, 79), (90, 50), (200, 40), (1, 1), (60, 80), (90, 50)]


class Scripted:
    """A runner that notes what it is given; ``hold`` makes results come when they are waited for."""

    def __init__(self, runner: EagerRunner, depth: int = 0) -> None:
        self.depth = depth
        self.submitted: list[tuple[int, Task]] = []
        self.waited: list[int] = []
        self.warmed: list[tuple[int, tuple[int, int]]] = []
        self.most = 10**9  # images of a group that the memory suffices for
        self._runner = runner

    def submit(self, group: Group, task: Task) -> Pending:
        if len(group.images) > self.most:
            raise DeviceMemoryError("cuda:0 has too little free memory for this")
        self.submitted.append((len(group.images), task))
        return _Noted(self, len(self.submitted) - 1, self._runner.submit(group, task))

    def warm(self, group: Group, task: Task) -> None:
        self.warmed.append((len(group.images), task.padded_size))


class _Noted:
    def __init__(self, runner: Scripted, number: int, ready: Ready) -> None:
        self._runner, self._number, self._ready = runner, number, ready

    def wait(self) -> PaddedDetections:
        self._runner.waited.append(self._number)
        return self._ready.wait()


def scripted(model: FpnDetector, *, depth: int = 0, batch_size: int = 1) -> tuple[Engine, Scripted]:
    runner = Scripted(EagerRunner(model.pipeline), depth)
    return Engine(model.pipeline, batch_size=batch_size, runner=runner), runner


@pytest.fixture
def pictures() -> list[Pixels]:
    return [make_picture(*shape, seed) for seed, shape in enumerate(SHAPES)]


@pytest.fixture
def reader(pictures: list[Pixels]) -> Callable[..., Pixels]:
    """Reads "0", "1" and so on; "bad" is none."""

    def read(path: object) -> Pixels:
        if path == "bad":
            raise ImageError("'bad' is not an image")
        return pictures[int(str(path)) % len(pictures)]

    return read


def names(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def captured(model: FpnDetector, lanes: int, batch_size: int) -> Lanes:
    runners = []
    for _ in range(lanes):
        transport = DeferredTransport()
        capture = RecordingCapture(transport)
        runners.append(CapturedRunner(fixed(model), transport, capture, batch_size=batch_size, graph_memory=10**9))
    return Lanes(runners)


@pytest.mark.usefixtures("atomic_ops")
@pytest.mark.parametrize(("lanes", "batch_size"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_a_captured_stream_finds_the_same(
    lanes: int, batch_size: int, model: FpnDetector, reader: Callable[..., Pixels]
) -> None:
    engine = Engine(fixed(model), batch_size=batch_size, runner=captured(model, lanes, batch_size))
    plain = Engine(fixed(model))
    paths = [*names(9), "bad", *names(11)]
    outcomes = list(engine.stream(paths, read=reader))
    assert [outcome.source for outcome in outcomes] == paths
    for outcome in outcomes:
        if outcome.source == "bad":
            assert isinstance(outcome.result, ImageError)
            continue
        assert isinstance(outcome.result, Detections)
        assert outcome.pixels is reader(outcome.source)
        (expected,) = plain(reader(outcome.source))
        if batch_size == 1:
            assert_same(outcome.result, expected)
        else:
            assert abs(len(outcome.result) - len(expected)) <= 1
            np.testing.assert_allclose(outcome.result.scores[:3], expected.scores[:3], atol=1e-4)


@pytest.mark.parametrize(("depth", "waits"), [(0, [0, 1, 2]), (2, [2, 3, 4])])
def test_how_far_work_runs_ahead(
    depth: int, waits: Sequence[int], model: FpnDetector, reader: Callable[..., Pixels]
) -> None:
    """When the first outcomes come, so many groups more have been submitted; each is waited for in its turn."""
    engine, runner = scripted(model, depth=depth)
    stream = engine.stream(names(8), read=reader)
    for number, ahead in enumerate(waits):
        assert next(stream).source == str(number)
        assert len(runner.submitted) == ahead + 1
        assert runner.waited == list(range(number + 1))
    assert [outcome.source for outcome in stream] == names(8)[len(waits) :]
    assert runner.waited == list(range(8))


def test_large_batches_are_not_waited_for_before_the_next_have_begun(
    model: FpnDetector, reader: Callable[..., Pixels]
) -> None:
    engine, runner = scripted(model, depth=SLOTS, batch_size=2)
    stream = engine.stream(["0"] * 30, read=reader)
    next(stream)
    assert [number for number, _ in runner.submitted] == [2] * 8  # two windows of four batches
    assert sum(1 for _ in stream) == 29


def test_the_next_are_read_while_one_computes(model: FpnDetector, reader: Callable[..., Pixels]) -> None:
    reached = threading.Event()

    def read(path: object) -> Pixels:
        if path == "1":
            reached.set()
        return reader(path)

    engine, runner = scripted(model)
    submit = runner.submit

    def compute(group: Group, task: Task) -> Pending:
        assert reached.wait(20)
        return submit(group, task)

    runner.submit = compute  # type: ignore[method-assign]
    assert len(list(engine.stream(names(3), read=read))) == 3


def test_memory_is_bounded(model: FpnDetector, reader: Callable[..., Pixels]) -> None:
    read: list[object] = []

    def note(path: object) -> Pixels:
        read.append(path)
        return reader(path)

    engine, _ = scripted(model, depth=2)
    stream = engine.stream((str(number) for number in range(10**9)), read=note)
    for taken in range(1, 6):
        next(stream)
        time.sleep(0.02)
        assert len(read) <= taken + 2 + 1 + 1  # under way, and one thread one ahead


def test_closing_ends_the_threads(model: FpnDetector, reader: Callable[..., Pixels]) -> None:
    engine, _ = scripted(model)
    before = count_threads()
    stream = engine.stream(names(100), read=reader)
    next(stream)
    assert count_threads() == before + 1
    assert isinstance(stream, Iterator)
    stream.close()  # type: ignore[attr-defined]
    assert count_threads() == before


def test_what_stops_one_stream_stops_no_other(model: FpnDetector, reader: Callable[..., Pixels]) -> None:
    def interrupt(path: object) -> Pixels:
        if path == "3":
            raise ZeroDivisionError
        return reader(path)

    engine, _ = scripted(model, depth=1)
    stream = engine.stream(names(6), read=interrupt)
    assert [next(stream).source for _ in range(3)] == ["0", "1", "2"]  # also what was under way
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert len(list(engine.stream(names(6), read=reader))) == 6


def test_less_memory_makes_smaller_batches(model: FpnDetector, pictures: list[Pixels]) -> None:
    engine, runner = scripted(model, batch_size=8)
    runner.most = 2
    same = [pictures[0]] * 7
    found = engine(same)
    assert [number for number, _ in runner.submitted] == [1, 2, 2, 2]
    assert [len(each) for each in found] == [len(engine(pictures[0])[0])] * 7


def test_no_memory_for_one_image_is_its_outcome(model: FpnDetector, reader: Callable[..., Pixels]) -> None:
    engine, runner = scripted(model, batch_size=2)
    runner.most = 0
    outcomes = list(engine.stream(names(3), read=reader))
    assert [outcome.source for outcome in outcomes] == names(3)
    for outcome in outcomes:
        assert isinstance(outcome.result, DeviceMemoryError)
        assert str(outcome.result) == f"{outcome.source}: cuda:0 has too little free memory for this"
    with pytest.raises(DeviceMemoryError, match=r"^image 0: cuda:0 has"):
        engine(reader("0"))


def test_a_device_that_fails_ends_the_stream(model: FpnDetector, reader: Callable[..., Pixels]) -> None:
    class Gone(Scripted):
        def submit(self, group: Group, task: Task) -> Pending:
            if len(self.submitted) == 2:
                raise BackendError("cuda:0 stopped working")
            return super().submit(group, task)

    engine = Engine(model.pipeline, runner=Gone(EagerRunner(model.pipeline)))
    stream = engine.stream(names(5), read=reader)
    assert [next(stream).source for _ in range(2)] == ["0", "1"]
    with pytest.raises(FpnEngineError, match="stopped working"):
        next(stream)


def test_threads_share_an_engine(tiny: Tiny, pictures: list[Pixels]) -> None:
    engine = Engine.load(tiny.plan, batch_size=2)
    expected = engine(pictures)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(2):
                for found, wanted in zip(engine(pictures), expected, strict=True):
                    assert_same(found, wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_warming_up_takes_the_largest_first(model: FpnDetector) -> None:
    engine, runner = scripted(model, batch_size=4)
    engine.warmup([(60, 80), (200, 40), (61, 79), (90, 50)], batches=[1, 4])
    sizes = [(64, 96), (96, 32), (96, 64)]
    assert sorted(runner.warmed) == sorted((batch, size) for batch in (1, 4) for size in sizes)
    areas = [batch * h * w for batch, (h, w) in runner.warmed]
    assert areas == sorted(areas, reverse=True)
    runner.warmed.clear()
    engine.warmup([(60, 80)])
    assert runner.warmed == [(4, (64, 96))]
    with pytest.raises(OptionError, match="batches must be from 1 to batch_size, 4, not 5"):
        engine.warmup([(60, 80)], batches=[5])


def test_buckets_change_the_padded_size(model: FpnDetector, pictures: list[Pixels]) -> None:
    runner = Scripted(EagerRunner(model.pipeline))
    engine = Engine(model.pipeline, batch_size=9, buckets=96, runner=runner)
    found = engine(pictures)
    assert {task.padded_size for _, task in runner.submitted} == {(96, 96)}
    assert [each.image_size for each in found] == SHAPES
    for each, (h, w) in zip(found, SHAPES, strict=True):
        assert (each.boxes <= np.array([w, h, w, h]) * (1 + 1e-6)).all()


def test_batches_of_one_size(pictures: list[Pixels]) -> None:
    batches = list(make_batches(SHAPES, SPEC, 2, Buckets(None, 32)))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(SHAPES)))
    assert [batch.indices for batch in batches if batch.padded_size == (64, 96)] == [[0, 1], [5]]
    assert all(len(batch.indices) == len(batch.image_sizes) <= 2 for batch in batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"streams": 2}, "streams must be at least 1, and 1 on the CPU, not 2"), ({"buckets": 100}, "multiple of 32")],
)
def test_options_that_do_not_fit(options: dict[str, int], message: str, tiny: Tiny) -> None:
    with pytest.raises(OptionError, match=message):
        Engine.from_plan(read_plan(tiny.plan), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda:1"), "the plan is for onnxruntime fp32 on cpu, not on cuda:1; build it again with"),
        (("--streams", 2), "streams must be at least 1, and 1 on the CPU"),
        (("--bucket", 100), "a bucket must be a multiple of 32 pixels per side"),
    ],
)
def test_the_command_says_so(options: tuple[object, ...], message: str, tiny: Tiny, workplace: Path, run: Run) -> None:
    save_picture(workplace / "a.png")
    ran = run("infer", "a.png", "--plan", tiny.plan, *options)
    assert ran.code == 1
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_the_command_takes_a_bucket(tiny: Tiny, workplace: Path, run: Run) -> None:
    save_picture(workplace / "a.png")
    for device in (("--device", "cpu"), ()):
        ran = run("infer", "a.png", "--plan", tiny.plan, "--bucket", 96, "--json", *device)
        assert ran.code == 0


def test_a_pipeline_of_its_own_for_each_stream(model: FpnDetector) -> None:
    engine = Engine([model.pipeline, model.pipeline])
    assert isinstance(engine._runner, Lanes)
    assert isinstance(model.pipeline, Pipeline)
    assert len(engine(make_picture(60, 80))) == 1
