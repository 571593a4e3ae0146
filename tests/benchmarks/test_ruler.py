"""The one ruler: who is timed when, how many rounds, and what is reckoned from the times."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.timing import describe_times, prepare, time_in_turns
from fpn_engine.ruler import FEWEST, ROUNDS, WARM_UP, Spread, Times, Turn, take_turns


def record(log: list[tuple[str, int]], name: str) -> Turn:
    return Turn("call", lambda number: log.append((name, number)), lambda: None)


def test_contestants_take_turns_in_every_round() -> None:
    log: list[tuple[str, int]] = []
    times = take_turns({name: record(log, name) for name in "ab"}, "cpu", rounds=2)
    assert WARM_UP["cpu"] == 1
    assert log == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [len(times.seconds[name]) for name in "ab"] == [2, 2], "the warm-up is not counted"


def test_rounds() -> None:
    log: list[tuple[str, int]] = []
    turn = {"a": record(log, "a")}
    assert len(take_turns(turn, "cpu").seconds["a"]) == ROUNDS["cpu"]
    assert len(take_turns(turn, "cpu", seconds=0.0).seconds["a"]) == FEWEST["cpu"], "whatever they take"
    assert len(take_turns(turn, "cpu", rounds=2, seconds=0.0).seconds["a"]) == 2
    assert len(take_turns(turn, "cpu", rounds=9, seconds=60.0).seconds["a"]) == 9
    began = time.perf_counter()
    assert len(take_turns(turn, "cpu", seconds=0.3).seconds["a"]) > FEWEST["cpu"]
    assert time.perf_counter() - began > 0.3


def test_what_is_put_in_place_is_not_timed() -> None:
    slow = Turn("call", lambda number: time.sleep(0.05), lambda: time.sleep(0.01))
    spread = take_turns({"slow": slow}, "cpu", rounds=3).spread("slow")
    assert 10 <= spread.median < 50


def test_it_works_within_inference_mode_and_after() -> None:
    turn = {"a": Turn("call", lambda number: None, lambda: None)}
    with torch.inference_mode():
        take_turns(turn, "cpu", rounds=1)
    take_turns(turn, "cpu", rounds=1)


def test_spread_and_ratio() -> None:
    spread = Spread.of([0.001 * number for number in range(1, 12)])
    assert (spread.p20, spread.median, spread.p80, spread.rounds) == pytest.approx((3, 6, 9, 11))
    assert Spread.of([0.123456]).to_dict() == {"median": 123.5, "p20": 123.5, "p80": 123.5, "rounds": 1}
    # The machine is ten times as slow in one round: medians of three would be off, the rounds' ratios are not.
    times = Times({"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 2.0]})
    assert times.ratio("ours", "theirs") == 0.5


def test_inputs_rotate() -> None:
    seen: list[float] = []
    inputs = [[torch.tensor(float(number))] for number in range(3)]
    times, turns = time_in_turns({"f": lambda x: seen.append(x.item())}, inputs, rounds=4)
    assert seen == [0.0, 1.0, 2.0, 0.0, 1.0]
    about = describe_times(times, turns)
    assert about["f"]["how"] == "call"
    assert about["f"]["milliseconds"]["rounds"] == 4
    turn = prepare(lambda x: x + 1, inputs, "cpu")
    turn.load(4)
    assert turn.run() == 2.0
