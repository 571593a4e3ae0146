"""The ruler: contestants take turns on rotating inputs; the middle of their times, and how far they spread.

Shared machines drift. So all that is to be compared runs in every round, one after another, and two contestants are
compared round by round. Caches are filled with something else before each turn.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch

WARM_UP = {"cuda": 5, "cpu": 1}  # rounds that are not counted
ROUNDS = {"cuda": 60, "cpu": 5}
FEWEST = {"cuda": 10, "cpu": 5}  # rounds, however long they take
# Bytes that are overwritten before each turn: several times an L2 cache, or about a processor's share of an L3. On a
# GPU these are some 60 us in which the host can queue the events and the call, so that its share is not measured unless
# the call waits for the device.
FLUSHED = {"cuda": 256 << 20, "cpu": 32 << 20}
WALL = "wall"


class Turn(NamedTuple):
    """How a contestant is timed, what puts the inputs of a round in place, and what is timed.

    ``how``: "wall" is the host's clock; anything else is the device's, which on a CPU is the host's as well.
    """

    how: str
    load: Callable[[int], None]
    run: Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Milliseconds: the middle one of ``rounds``, and those that a fifth of them stay below and above."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        p20, median, p80 = (float(value) for value in 1e3 * np.percentile(seconds, [20, 50, 80]))
        return cls(median=median, p20=p20, p80=p80, rounds=len(seconds))

    def to_dict(self) -> dict[str, Any]:
        """Four digits of each."""
        return {name: float(f"{value:.4g}") if name != "rounds" else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each contestant, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """The middle one of the rounds' ratios: what slows both down for a while does not move it."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return float(f"{statistics.median(mine / theirs for mine, theirs in pairs):.4g}")


def take_turns(
    turns: Mapping[str, Turn],
    device: str,
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    warm_up: int | None = None,
) -> Times:
    """Time all contestants in every round.

    Args:
        turns: by name; those of a round are given the round's number.
        device: "cuda" or "cpu".
        rounds: that are counted; with ``seconds`` at most. None: ROUNDS, or with ``seconds`` as many as fit.
        seconds: after which FEWEST rounds are enough.
        warm_up: rounds that are not counted, None is WARM_UP.
    """
    limit: float = rounds or (ROUNDS[device] if seconds is None else math.inf)
    fewest = limit if seconds is None else min(limit, FEWEST[device])
    spent: dict[str, list[float]] = {name: [] for name in turns}
    skipped = WARM_UP[device] if warm_up is None else warm_up
    for number in range(skipped):
        for turn in turns.values():
            _time(turn, number, device)
    number, begin = skipped, time.perf_counter()
    while number - skipped < limit and (
        number - skipped < fewest or time.perf_counter() - begin < (math.inf if seconds is None else seconds)
    ):
        for name, turn in turns.items():
            spent[name].append(_time(turn, number, device))
        number += 1
    return Times(spent)


def _time(turn: Turn, number: int, device: str) -> float:
    turn.load(number)
    if device == "cuda":
        torch.cuda.synchronize()
        _flushed("cuda").zero_()
        if turn.how != WALL:
            return _time_on_cuda(turn.run)
        torch.cuda.synchronize()
    else:
        _flushed("cpu").zero_()
    start = time.perf_counter()
    turn.run()
    return time.perf_counter() - start


def _time_on_cuda(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _flushed(device: str) -> torch.Tensor:
    with torch.inference_mode(False):  # whoever asks first
        return torch.empty(FLUSHED[device], dtype=torch.uint8, device=device)
