"""Stand-ins for a GPU: a transport that does nothing before it is waited for, and a capture that records operators."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.engine.runtime.host_reads import NoHostReads

POISON = 0xA5


class DeferredTransport:
    """Work is queued, in order, and done when an event is waited for.

    Args: early_uploads: uploads happen as soon as they are given, as on a stream with nothing else to do: what they
        overwrite too early shows. Otherwise as late as may be: what is overwritten before it was read shows.
    """

    device = torch.device("cpu")

    def __init__(self, *, early_uploads: bool = False) -> None:
        self.log: list[str] = []
        self.waits = 0
        self.failure: Exception | None = None  # what launch raises next
        self._early = early_uploads
        self._queue: deque[tuple[int, Callable[[], Any]]] = deque()
        self._given = 0
        self._lock = threading.RLock()

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def host_buffer(self, size: int) -> Tensor:
        return torch.full((size,), POISON, dtype=torch.uint8)

    device_buffer = host_buffer

    def upload(self, source: Tensor, target: Tensor) -> DeferredEvent:
        if self._early:
            self.log.append("upload")
            target.copy_(source)
            return DeferredEvent(self, 0)
        return self.give("upload", lambda: target.copy_(source))

    def place(self, image: Tensor, target: Tensor) -> None:
        if self._early:
            self.log.append("place")
            target.copy_(image)
        else:
            self.give("place", lambda: target.copy_(image))

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.give("copy", lambda: target.copy_(source))

    def launch(self, run: Callable[[], Tensor]) -> Tensor:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        self.drain()
        self.log.append("launch")
        return run()

    def download(self, source: Tensor, target: Tensor) -> DeferredEvent:
        return self.give("download", lambda: target.copy_(source))

    def keep(self, source: Tensor) -> tuple[Tensor, DeferredEvent]:
        kept = torch.full_like(source, POISON)
        return kept, self.give("keep", lambda: kept.copy_(source))

    def hand_over(self, kept: Tensor) -> None:
        self.log.append("hand over")

    def release(self) -> None:
        self.log.append("release")

    def give(self, name: str, work: Callable[[], Any]) -> DeferredEvent:
        with self._lock:
            self._given += 1
            self._queue.append((self._given, work))
            self.log.append(name)
            return DeferredEvent(self, self._given)

    def drain(self, until: int | None = None) -> None:
        with self._lock, torch.inference_mode():
            while self._queue and (until is None or self._queue[0][0] <= until):
                self._queue.popleft()[1]()

    @property
    def queued(self) -> int:
        return len(self._queue)


class DeferredEvent:
    """All that was given to a transport up to a number."""

    def __init__(self, transport: DeferredTransport, number: int) -> None:
        self._transport = transport
        self._number = number

    def synchronize(self) -> None:
        self._transport.waits += 1
        self._transport.drain(self._number)


class RecordingCapture:
    """Records the operators of a run with their tensors; a replay runs them again on the same memory.

    Nothing of the run's Python is repeated, so that a value which it took from a tensor is the old one, as in a CUDA
    graph; what reads one is refused to begin with.

    Args: sizes: nbytes of the graphs to come, in turn; growth: of the pool likewise.
    """

    def __init__(self, transport: DeferredTransport, sizes: tuple[int, ...] = (), growth: tuple[int, ...] = ()) -> None:
        self.pool_bytes = 0
        self.live: list[Recorded] = []
        self.captures = 0
        self.renewals = 0
        self._transport = transport
        self._sizes = iter(sizes)
        self._growth = iter(growth)

    def __call__(self, run: Callable[[], Tensor]) -> Recorded:
        self._transport.drain()
        self.captures += 1
        self.pool_bytes += next(self._growth, 0)
        recorded = Recorded(self, run, next(self._sizes, 1))
        self.live.append(recorded)
        return recorded

    def renew(self) -> None:
        assert not self.live, "a graph is left in the pool"
        self.renewals += 1
        self.pool_bytes = 0

    def replay(self, recorded: Recorded) -> None:
        assert recorded in self.live, "a dropped graph is replayed"
        self._transport.give("replay", recorded.run_again)

    def drop(self, recorded: Recorded) -> None:
        self._transport.drain()
        self.live.remove(recorded)


class Recorded:
    """One recorded run."""

    def __init__(self, capture: RecordingCapture, run: Callable[[], Tensor], nbytes: int) -> None:
        self.nbytes = nbytes
        self.replays = 0
        self._capture = capture
        recorder = _Recorder()
        with recorder:
            self.output = run()
        self.steps = recorder.steps
        self._places = [_places(step) for step in self.steps]

    def replay(self) -> None:
        self._capture.replay(self)

    def drop(self) -> None:
        self._capture.drop(self)

    def run_again(self) -> None:
        self.replays += 1
        for step, places in zip(self.steps, self._places, strict=True):
            func, args, kwargs, output = step
            results = _tensors(func(*args, **kwargs))
            kept = _tensors(output)
            assert [r.shape for r in results] == [k.shape for k in kept], f"{func} has another shape than before"
            read = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            for result, place in zip(results, kept, strict=True):
                if result.untyped_storage().data_ptr() not in read:  # neither a view nor written in place
                    place.copy_(result)
            assert _places(step) == places, f"{func} has other addresses than before"


class _Recorder(NoHostReads):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, output))
        return output


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _places(step: tuple[Any, Any, Any, Any]) -> list[tuple[int, torch.Size, tuple[int, ...]]]:
    return [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in _tensors(step[1:])]
