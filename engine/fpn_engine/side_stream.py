"""Side streams: what two parts of a computation that do not wait for each other run on, eagerly and in CUDA graphs.

A capture of the current stream takes a side stream's work in as a branch of the graph, from the fork to the join.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

# Another pool of torch's than that of the runtime's streams: no side stream is one that somebody else captures.
_PRIORITY = -1
_lock = threading.Lock()
_streams: dict[torch.cuda.Stream, torch.cuda.Stream] = {}  # by the stream that they are beside


class Beside(Protocol):
    """Forked from the current stream: see :func:`fork`."""

    def running(self) -> contextlib.AbstractContextManager[object]:
        """Work that is given inside runs beside the current stream's."""

    def join(self) -> None:
        """What the current stream is given from here on waits for all of it."""


class SideStream:
    """On CUDA. Memory that is taken inside :meth:`running` must not outlive the join, or be recorded on the stream."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)
        with _lock:
            if self._main not in _streams:
                _streams[self._main] = torch.cuda.Stream(device, priority=_PRIORITY)
            self._side = _streams[self._main]
        self._side.wait_stream(self._main)

    @contextmanager
    def running(self) -> Iterator[None]:
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        self._main.wait_stream(self._side)


class NoStream:
    """Without streams everything is done when it is given."""

    def running(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def join(self) -> None:
        pass


def fork(device: torch.device) -> Beside:
    """What runs beside the current stream of ``device`` from here on, after what that was given so far."""
    return SideStream(device) if device.type == "cuda" else NoStream()
