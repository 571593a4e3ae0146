"""How long an engine takes, and which of its stages take it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fpn_engine.engine import Engine
from fpn_engine.files import replacing
from fpn_engine.ruler import FEWEST, WALL, Spread, Turn, take_turns
from fpn_engine.stages import STAGES, watching
from fpn_engine.work import Pixels

WARM_UP = 3  # calls with each batch on CUDA: a graph is captured in the second
WHOLE = "whole"


def time_engine(
    engine: Engine, batches: Sequence[Sequence[Pixels]], *, rounds: int | None = None, seconds: float = 5.0
) -> Spread:
    """Time of a call, from images in host memory to detections there.

    Args:
        batches: images of a call, (H, W, 3) uint8 each; the calls take turns with them.
        rounds: calls; None makes as many as fit into ``seconds``, five (on CUDA ten) at least.
    """
    device, at = engine.device.type, [0]

    def load(number: int) -> None:
        at[0] = number % len(batches)

    turns = {WHOLE: Turn(WALL, load, lambda: engine(batches[at[0]]))}
    warm_up = WARM_UP * len(batches) if device == "cuda" else 1
    limit = seconds if rounds is None else None
    return take_turns(turns, device, rounds=rounds, seconds=limit, warm_up=warm_up).spread(WHOLE)


def time_stages(engine: Engine, images: Sequence[Pixels], rounds: int = FEWEST["cpu"]) -> dict[str, float]:
    """Milliseconds of each stage of a call, and of the "whole" call; medians, in the order of the dataflow.

    A stage's time is that of its work on the device; the rest of the whole is reading, copying, and on CUDA what the
    host needs to launch operations one by one. ``engine`` has to run so, without graphs. Stages that the model does not
    have are left out.
    """
    clock = _CudaClock() if engine.device.type == "cuda" else _CpuClock()
    engine(images)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        start = time.perf_counter()
        with watching(clock.watch):
            engine(images)
        whole = 1e3 * (time.perf_counter() - start)
        for name, spent in {**clock.take(), WHOLE: whole}.items():
            found.setdefault(name, []).append(spent)
    return {name: statistics.median(found[name]) for name in (*STAGES, WHOLE) if name in found}


def write_trace(engine: Engine, images: Sequence[Pixels], path: Path) -> None:
    """One call as a Chrome trace, for chrome://tracing or Perfetto, with the stages' names."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    engine(images)
    # Some versions of torch warn that events go at the end of a cycle unless they are to be kept.
    profile = torch.profiler.profile(activities=activities, acc_events=True)
    with profile as profiler, watching(torch.profiler.record_function):
        engine(images)
    with replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))


class _CpuClock:
    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._spent[name] = self._spent.get(name, 0.0) + 1e3 * (time.perf_counter() - start)

    def take(self) -> dict[str, float]:
        """Milliseconds since the last time."""
        spent, self._spent = self._spent, {}
        return spent


class _CudaClock:
    def __init__(self) -> None:
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    def take(self) -> dict[str, float]:
        """Milliseconds since the last time; waits for the device."""
        torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for name, start, end in self._events:
            spent[name] = spent.get(name, 0.0) + start.elapsed_time(end)
        self._events.clear()
        return spent
