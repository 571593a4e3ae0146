"""Timing: contestants take turns on rotating inputs, on the device's own clock where there is one."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

WARM_UP = 5
ROUNDS = {"cuda": 60, "cpu": 5}
LEAST_ROUNDS = 10  # where the time is limited
# Bytes that are overwritten before each call: several times an L2 cache, and some 60 us in which the host can queue the
# events and the call, so that its share is not measured unless the call waits for the device.
FLUSHED = 256 << 20

Contestant = Callable[..., Any]
# How it is timed, what puts the inputs of a round in place, and what is timed.
Turn = tuple[str, Callable[[int], None], Callable[[], Any]]


class Replay:
    """A CUDA graph of one call on inputs of its own.

    Raises: RuntimeError if the call cannot be captured, because it waits for the device.
    """

    def __init__(self, function: Contestant, inputs: Sequence[Any]) -> None:
        self._inputs = [_clone(value) for value in inputs]
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function(*self._inputs)  # compiles
            torch.cuda.synchronize()
            # What waits raises here: a capture that fails leaves stream and allocator behind in disorder.
            with _no_waiting():
                function(*self._inputs)
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.outputs = function(*self._inputs)
        finally:
            torch.cuda.set_stream(current)


def time_in_turns(
    contestants: Mapping[str, Contestant], inputs: Sequence[Sequence[Any]], *, rounds: int | None = None
) -> dict[str, dict[str, Any]]:
    """Median, p20 and p80 in microseconds of each contestant, all timed in every round on the same inputs.

    On CUDA a contestant that can be captured is timed as a graph replay (``how`` "graph"), without the host's share;
    the others with events around the call ("call"). Inputs rotate and the cache is flushed, so that it does not hold
    them.
    """
    device = next(t.device.type for t in _tensors(inputs[0]))
    turns = {name: prepare(function, inputs, device) for name, function in contestants.items()}
    return take_turns(turns, device, rounds=rounds)


def take_turns(
    turns: Mapping[str, Turn], device: str, *, rounds: int | None = None, seconds: float = math.inf
) -> dict[str, dict[str, Any]]:
    """As :func:`time_in_turns`, of what is prepared already; after ``seconds`` ten rounds are enough."""
    rounds = rounds or ROUNDS[device]
    warm_up = WARM_UP * (device == "cuda")
    times: dict[str, list[float]] = {name: [] for name in turns}
    begin = time.perf_counter()
    for number in range(warm_up + rounds):
        if time.perf_counter() - begin > seconds and number >= warm_up + LEAST_ROUNDS:
            break
        for name, (_, load, run) in turns.items():
            load(number)
            times[name].append(_time_on_cuda(run) if device == "cuda" else _time_on_cpu(run))
    return {
        name: {"how": turns[name][0], **summarise(spent[warm_up:]), "rounds": len(spent) - warm_up}
        for name, spent in times.items()
    }


def summarise(microseconds: Sequence[float]) -> dict[str, float]:
    p20, median, p80 = (float(f"{value:.4g}") for value in np.percentile(microseconds, [20, 50, 80]))
    return {"median_us": median, "p20_us": p20, "p80_us": p80}


def prepare(function: Contestant, inputs: Sequence[Sequence[Any]], device: str) -> Turn:
    """A function on rotating inputs: on CUDA as graph replays if it can be captured."""
    at = [0]

    def call() -> Any:
        return function(*inputs[at[0]])

    def load(number: int) -> None:
        at[0] = number % len(inputs)

    if device == "cpu":
        return "call", load, call
    try:
        replays = [Replay(function, given) for given in inputs]
    except RuntimeError:
        torch.cuda.synchronize()
        return "call", load, call
    return "graph", load, lambda: replays[at[0]].graph.replay()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """PyTorch raises RuntimeError where the host would wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _time_on_cuda(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _flushed().zero_()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")


def _time_on_cpu(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        found += _tensors(value) if isinstance(value, (list, tuple)) else [value] * isinstance(value, torch.Tensor)
    return found


def _clone(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(v) for v in value)
    return value.clone() if isinstance(value, torch.Tensor) else value
