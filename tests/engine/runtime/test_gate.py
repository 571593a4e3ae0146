"""The gate: together, alone, and who goes first."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from fpn_engine.runtime.gate import Gate

LONG = 20.0  # seconds, for what should happen at once
SHORT = 0.05  # for what should not happen


def in_thread(action: object) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_many_are_inside_together() -> None:
    gate, meeting = Gate(), threading.Barrier(4)

    def enter() -> None:
        with gate.together():
            meeting.wait(LONG)

    threads = [in_thread(enter) for _ in range(4)]
    for thread in threads:
        thread.join(LONG)
    assert not meeting.broken


def test_one_alone_waits_for_those_inside_and_goes_before_those_that_come() -> None:
    gate, order = Gate(), list[str]()

    def enter(kind: str) -> None:
        with getattr(gate, kind)():
            order.append(kind)

    with ExitStack() as inside:
        inside.enter_context(gate.together())
        alone = in_thread(lambda: enter("alone"))
        while gate._alone == 0:
            time.sleep(0.001)
        later = in_thread(lambda: enter("together"))
        time.sleep(SHORT)
        assert order == []
    for thread in (alone, later):
        thread.join(LONG)
    assert order == ["alone", "together"]


def test_nobody_is_inside_with_the_one_alone() -> None:
    gate, inside, failures = Gate(), list[str](), list[list[str]]()

    def work(kind: str) -> None:
        for _ in range(200):
            with getattr(gate, kind)():
                inside.append(kind)
                if "alone" in inside and len(inside) > 1:
                    failures.append(list(inside))
                inside.remove(kind)

    threads = [in_thread(lambda kind=kind: work(kind)) for kind in ("together", "alone", "together", "alone")]
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert failures == []


@pytest.mark.parametrize("kind", ["alone", "together"])
def test_an_exception_leaves_the_gate_open(kind: str) -> None:
    gate = Gate()
    with pytest.raises(ZeroDivisionError), getattr(gate, kind)():
        raise ZeroDivisionError
    with gate.alone():
        pass
    with gate.together(), gate.together():
        pass
