"""Work beside the current stream: what waits for what, with streams that only write down what they are told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_engine import beside


class Stream:
    device = torch.device("cuda", 0)

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


class Streams:
    """The current stream, and one beside it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current = Stream("main", self.log)
        self.beside: Any = Stream("side", self.log)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def work(self, name: str, value: float = 1.0) -> Tensor:
        self.log.append(f"{name} on {self.current.name}")
        return torch.tensor(value)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


def test_fork_and_join(streams: Streams) -> None:
    with beside.using(streams.beside):
        result = beside.begin(lambda: streams.work("check"))
        streams.work("all else")
        assert result() == 1
    assert streams.log == ["side waits for main", "check on side", "all else on main", "main waits for side"]


def test_later_work_may_ask_for_earlier(streams: Streams) -> None:
    with beside.using(streams.beside):
        first = beside.begin(lambda: streams.work("first"))
        second = beside.begin(lambda: first() + streams.work("second"))
        assert second() == 2
    assert [line for line in streams.log if "on" in line.split()] == ["first on side", "second on side"]
    assert streams.log[-1] == "main waits for side"


def test_without_a_stream_it_is_done_when_asked_for(streams: Streams) -> None:
    result = beside.begin(lambda: streams.work("check"))
    streams.work("all else")
    assert result() == 1
    assert streams.log == ["all else on main", "check on main"]


def test_it_is_a_threads_own_and_ends(streams: Streams) -> None:
    def elsewhere() -> None:
        beside.begin(lambda: streams.work("elsewhere"))()

    with beside.using(streams.beside):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    with pytest.raises(ZeroDivisionError), beside.using(streams.beside):
        raise ZeroDivisionError
    beside.begin(lambda: streams.work("afterwards"))()
    assert streams.log == ["elsewhere on main", "afterwards on main"]
