"""Graphs: which (batch, padded size, thresholds) are captured, from one memory pool, and which are given up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

MAX_LINES = 512  # prepared lines, captured or not; 83 padded sizes exist under 800 / 1333

LineT = TypeVar("LineT", bound=Callable[[], Tensor])


class Captured(Protocol):
    """A recorded run.

    Attributes:
        output: what the run returned; overwritten by every replay of any graph of the same pool.
        nbytes: memory that it takes beside the pool's.
    """

    output: Tensor
    nbytes: int

    def replay(self) -> None:
        """Give the whole run to the computing stream."""
        ...

    def drop(self) -> None:
        """Free it; it must not be replayed again."""
        ...


class Capture(Protocol):
    """Records runs; all of them take their memory from one pool, as only one replays at a time.

    Attributes:
        pool_bytes: size of the pool. It shrinks by ``renew`` alone, since graphs share its memory.
    """

    pool_bytes: int

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        """Record ``run``, which has run before, so that nothing is compiled or chosen for the first time."""
        ...

    def renew(self) -> None:
        """Begin another pool; there must be no graph left in the old one."""
        ...


@dataclass(slots=True)
class _Entry(Generic[LineT]):
    line: LineT
    has_run: bool = False
    captured: Captured | None = None


class GraphCache(Generic[LineT]):
    """Lines by key; one that comes back is captured, as a shape that is seen once is not worth a capture.

    Args:
        launch: runs a line without a graph.
        limit: bytes of all graphs and their pool. Above it the least recently used graphs go; if the newest alone
            is above it, the pool is begun anew with it, without what others had needed. One graph is always kept.
    """

    def __init__(self, capture: Capture, launch: Callable[[LineT], Tensor], limit: int) -> None:
        self._capture = capture
        self._launch = launch
        self._limit = limit
        self._in_pool = 0  # graphs that the pool was ever asked for
        self._entries: OrderedDict[Hashable, _Entry[LineT]] = OrderedDict()

    @property
    def captured(self) -> list[Hashable]:
        """What has a graph, least recently used first."""
        return [key for key, entry in self._entries.items() if entry.captured]

    @property
    def nbytes(self) -> int:
        """Memory of all graphs and their pool."""
        graphs = sum(entry.captured.nbytes for entry in self._entries.values() if entry.captured)
        return self._capture.pool_bytes + graphs

    def prepare(self, key: Hashable, make: Callable[[], LineT]) -> LineT:
        """The line of ``key``, made at its first use."""
        if key not in self._entries:
            self._entries[key] = _Entry(make())
            while len(self._entries) > MAX_LINES:
                self._drop(next(iter(self._entries)))
        self._entries.move_to_end(key)
        return self._entries[key].line

    def run(self, key: Hashable) -> Tensor:
        """Run the prepared line of ``key``: the first time as it is, the second time captured, then replayed."""
        entry = self._entries[key]
        if entry.captured is None:
            if not entry.has_run:
                output = self._launch(entry.line)
                entry.has_run = True
                return output
            entry.captured = self._record(entry.line)
            self._make_room(key)
        entry.captured.replay()
        return entry.captured.output

    def find(self, key: Hashable) -> Captured | None:
        """The graph of ``key``, if there is one."""
        return self._entries[key].captured if key in self._entries else None

    def clear(self) -> None:
        """Give up all lines and graphs, and their memory."""
        for key in list(self._entries):
            self._drop(key)
        self._renew()

    def _record(self, line: LineT) -> Captured:
        if self._in_pool and not self.captured:
            self._renew()  # torch refuses graphs to a pool that all have left, or whose last capture failed
        self._in_pool += 1
        return self._capture(line)

    def _make_room(self, key: Hashable) -> None:
        for other in self.captured:
            if self.nbytes <= self._limit:
                return
            if other != key:
                self._drop(other)
        entry = self._entries[key]
        if self.nbytes > self._limit and self._in_pool > 1 and entry.captured:
            entry.captured.drop()
            entry.captured = None
            self._renew()
            entry.captured = self._record(entry.line)

    def _renew(self) -> None:
        self._capture.renew()
        self._in_pool = 0

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key)
        if entry.captured is not None:
            entry.captured.drop()
