"""Which runs are captured, and which graphs go when memory is short."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch
from torch import Tensor

from fpn_engine.runtime import graphs as graphs_module
from fpn_engine.runtime.graphs import GraphCache
from tests.engine.runtime.stand_ins import DeferredTransport, RecordingCapture


class Twice:
    """A line that doubles what is in its place."""

    def __init__(self) -> None:
        self.place = torch.ones(2)
        self.runs = 0

    def __call__(self) -> Tensor:
        self.runs += 1
        return self.place * 2


class Bench:
    """A cache with a recording stand-in."""

    def __init__(self, limit: int = 10**9, sizes: tuple[int, ...] = (), growth: tuple[int, ...] = ()) -> None:
        self.transport = DeferredTransport()
        self.capture = RecordingCapture(self.transport, sizes, growth)
        self.cache: GraphCache[Twice] = GraphCache(self.capture, self.transport.launch, limit)

    def run(self, key: Hashable, value: float = 1.0) -> float:
        line = self.cache.prepare(key, Twice)
        line.place.fill_(value)
        output = self.cache.run(key)
        self.transport.drain()
        return float(output[0])


def test_captured_when_it_comes_back() -> None:
    bench = Bench()
    line = bench.cache.prepare("a", Twice)
    assert [bench.run("a", value) for value in (1, 2, 3, 4)] == [2, 4, 6, 8]
    assert line.runs == 2  # once as it is, once recorded
    assert bench.capture.captures == 1
    assert bench.capture.live[0].replays == 3
    assert bench.run("b", 5) == 10
    assert bench.cache.captured == ["a"]


def test_a_line_is_made_once() -> None:
    bench = Bench()
    assert bench.cache.prepare("a", Twice) is bench.cache.prepare("a", Twice)


def test_the_least_recently_used_goes() -> None:
    bench = Bench(limit=100, sizes=(40, 40, 40))
    for key in "aabb":
        bench.run(key)
    bench.run("a")
    for key in "cc":
        bench.run(key)
    assert bench.cache.captured == ["a", "c"]
    assert len(bench.capture.live) == 2
    assert bench.cache.nbytes == 80
    assert [bench.run(key, 3) for key in "bca"] == [6, 6, 6]


def test_memory_of_the_pool_is_counted_once() -> None:
    bench = Bench(limit=100, sizes=(10, 10, 15), growth=(70, 0, 0))
    for key in "aabb":
        bench.run(key)
    assert bench.cache.captured == ["a", "b"]
    assert bench.cache.nbytes == 90
    bench.run("c")
    bench.run("c")
    assert bench.cache.captured == ["b", "c"]
    assert bench.cache.nbytes == 95


def test_a_pool_that_others_made_large_is_begun_anew() -> None:
    bench = Bench(limit=100, sizes=(10, 10, 10), growth=(95, 30, 30))
    for key in "aab":
        bench.run(key)
    assert bench.run("b", 4) == 8
    assert bench.capture.renewals == 1
    assert bench.cache.captured == ["b"]
    assert bench.cache.nbytes == 40


def test_one_graph_is_always_kept() -> None:
    bench = Bench(limit=5, sizes=(10, 20), growth=(100, 100))
    for key in "aa":
        bench.run(key)
    assert bench.cache.captured == ["a"]
    assert bench.capture.captures == 1  # alone in its pool: another one would be as large
    assert bench.run("a", 7) == 14


def test_all_given_up() -> None:
    bench = Bench(growth=(50,))
    for key in "aab":
        bench.run(key)
    bench.cache.clear()
    assert bench.cache.captured == []
    assert bench.cache.nbytes == 0
    assert bench.capture.live == []
    assert bench.capture.renewals == 1
    assert [bench.run("a", value) for value in (1, 2, 3)] == [2, 4, 6]


def test_lines_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "MAX_LINES", 3)
    bench = Bench()
    bench.run("a")
    bench.run("a")
    for key in range(10):
        bench.run(key)
    assert bench.capture.live == []
    assert bench.cache.find("a") is None
    assert bench.cache.find(9) is None


def test_a_pool_that_all_have_left_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes no graph into one."""
    monkeypatch.setattr(graphs_module, "MAX_LINES", 1)
    bench = Bench(growth=(50, 20))
    for key in "aab":
        bench.run(key)
    assert (bench.capture.live, bench.capture.renewals, bench.cache.nbytes) == ([], 0, 50)
    bench.run("b")
    assert (bench.capture.renewals, bench.cache.nbytes) == (1, 21)


def test_nor_one_whose_capture_failed() -> None:
    bench = Bench()
    bench.run("a")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(RecordingCapture, "__call__", lambda self, run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.run("a")
    monkey.undo()
    assert bench.run("a", 3) == 6
    assert bench.capture.renewals == 1


def test_a_capture_that_fails_leaves_the_line() -> None:
    bench = Bench()
    bench.run("a")
    capture, bench.cache._capture = bench.cache._capture, None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        bench.run("a")
    bench.cache._capture = capture
    assert bench.run("a", 2) == 4
