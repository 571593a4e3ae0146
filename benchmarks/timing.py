"""Functions on rotating inputs as turns for the ruler: captured in a CUDA graph where they can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fpn_engine import beside
from fpn_engine.ruler import Times, Turn, take_turns

Function = Callable[..., Any]


class Replay:
    """A CUDA graph of one call on inputs of its own.

    Raises: RuntimeError if the call cannot be captured, because it waits for the device.
    """

    def __init__(self, function: Function, inputs: Sequence[Any]) -> None:
        self._inputs = [_clone(value) for value in inputs]
        current = torch.cuda.current_stream()
        stream, side = torch.cuda.Stream(), torch.cuda.Stream(priority=beside.PRIORITY)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), beside.using(side):
            function(*self._inputs)  # compiles
            torch.cuda.synchronize()
            # What waits raises here: a capture that fails leaves stream and allocator behind in disorder.
            with _no_waiting():
                function(*self._inputs)
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph), beside.using(side):
                self.outputs = function(*self._inputs)
        finally:
            torch.cuda.set_stream(current)


def time_in_turns(
    functions: Mapping[str, Function],
    inputs: Sequence[Sequence[Any]],
    *,
    rounds: int | None = None,
    seconds: float | None = None,
) -> tuple[Times, dict[str, Turn]]:
    """All functions in every round on the same inputs, which rotate.

    On CUDA a function that can be captured is timed as a graph replay ("graph"), without the host's share; the others
    with events around the call ("call").
    """
    device = next(t.device.type for t in _tensors(inputs[0]))
    turns = {name: prepare(function, inputs, device) for name, function in functions.items()}
    return take_turns(turns, device, rounds=rounds, seconds=seconds), turns


def prepare(function: Function, inputs: Sequence[Sequence[Any]], device: str) -> Turn:
    """A function on rotating inputs: on CUDA as graph replays if it can be captured."""
    at = [0]

    def call() -> Any:
        return function(*inputs[at[0]])

    def load(number: int) -> None:
        at[0] = number % len(inputs)

    if device == "cpu":
        return Turn("call", load, call)
    try:
        replays = [Replay(function, given) for given in inputs]
    except RuntimeError:
        torch.cuda.synchronize()
        return Turn("call", load, call)
    return Turn("graph", load, lambda: replays[at[0]].graph.replay())


def describe_times(times: Times, turns: Mapping[str, Turn]) -> dict[str, dict[str, Any]]:
    """JSON-ready, by contestant."""
    return {name: {"how": turn.how, "milliseconds": times.spread(name).to_dict()} for name, turn in turns.items()}


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


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        found += _tensors(value) if isinstance(value, (list, tuple)) else [value] * isinstance(value, torch.Tensor)
    return found


def _clone(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(v) for v in value)
    return value.clone() if isinstance(value, torch.Tensor) else value
