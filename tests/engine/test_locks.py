"""Locks between processes; what a killed holder does is tested with builds and downloads."""

import threading
from pathlib import Path

import pytest

from fpn_engine.errors import FpnEngineError
from fpn_engine.locks import alone_on

PATIENCE = 30.0


def test_the_second_waits_for_the_first(workplace: Path) -> None:
    order: list[str] = []
    waits = threading.Event()

    def second() -> None:
        with alone_on(workplace / "x", "work", waits.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with alone_on(workplace / "x", "work", waits.set) as place:
        assert place.parent == workplace.parent / "cache" / "work"
        thread.start()
        assert waits.wait(PATIENCE)
        order.append("first")
    thread.join(PATIENCE)
    assert order == ["first", "second"]


def test_other_paths_and_other_work_do_not_wait(workplace: Path) -> None:
    def refuse() -> None:
        raise AssertionError("it waited")

    x, y = workplace / "x", workplace / "y"
    with alone_on(x, "work"), alone_on(y, "work", refuse), alone_on(x, "other", refuse):
        pass


def test_a_cache_that_cannot_be_written(workplace: Path) -> None:
    (workplace.parent / "cache").mkdir()
    (workplace.parent / "cache" / "work").write_text("a file")
    with pytest.raises(FpnEngineError, match="cannot use the cache folder"), alone_on(workplace / "x", "work"):
        pass
