"""Reading ahead: in order, bounded, errors in their turn, threads that end."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import pytest

from fpn_engine.errors import BackendError, ImageError
from fpn_engine.reading import ReadAhead

Path = str | os.PathLike[str]


def count_threads() -> int:
    return sum(thread.name.startswith("fpn-engine-read") for thread in threading.enumerate())


def wait_until(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.005)
    assert condition()  # type: ignore[operator]


@pytest.mark.parametrize("threads", [1, 4])
def test_in_order_though_not_read_in_order(threads: int) -> None:
    def read(path: Path) -> str:
        time.sleep(0.02 if str(path) == "0" else 0)
        return f"pixels of {path}"

    with ReadAhead(map(str, range(20)), read, threads=threads, ahead=3) as reading:
        taken = [item for count in (1, 5, 7, 100) for item in reading.take(count)]
        assert reading.take(1) == []
    assert taken == [(str(number), f"pixels of {number}") for number in range(20)]


def test_at_most_so_many_are_begun() -> None:
    begun: list[Path] = []
    with ReadAhead(iter(lambda: "a", None), lambda path: begun.append(path), threads=2, ahead=3) as reading:
        reading.take(2)
        wait_until(lambda: len(begun) == 5)  # two and three ahead
        time.sleep(0.02)
        assert len(begun) == 5
        reading.take(1)
        wait_until(lambda: len(begun) == 6)


def test_other_threads_read_while_one_computes() -> None:
    reached = threading.Event()

    def read(path: Path) -> Path:
        if path == "b":
            reached.set()
        return path

    with ReadAhead(["a", "b"], read, threads=1, ahead=1) as reading:
        assert reading.take(1)[0].path == "a"
        assert reached.wait(20)  # without anyone having asked for it


def test_our_errors_are_items() -> None:
    def read(path: Path) -> Path:
        if path == "bad":
            raise ImageError("no image")
        return path

    with ReadAhead(["a", "bad", "c"], read, threads=2, ahead=2) as reading:
        a, bad, c = reading.take(3)
    assert (a.result, c.result) == ("a", "c")
    assert bad.path == "bad"
    assert isinstance(bad.result, ImageError)


def test_others_end_the_items_before_them() -> None:
    def read(path: Path) -> Path:
        return [path][path == "bad"]  # has no second

    with ReadAhead(["a", "b", "bad", "c"], read, threads=2, ahead=4) as reading:
        assert [item.path for item in reading.take(10)] == ["a", "b"]
        assert reading.take(1) == []
        with pytest.raises(IndexError):
            reading.raise_failure()


def test_a_broken_device_ends_them_too() -> None:
    """It would be told for each of a hundred thousand files otherwise."""

    def read(path: Path) -> Path:
        if path == "bad":
            raise BackendError("cuda:0 stopped working")
        return path

    with ReadAhead(["a", "bad", "c"], read, threads=1, ahead=1) as reading:
        assert [item.path for item in reading.take(3)] == ["a"]
        with pytest.raises(BackendError):
            reading.raise_failure()


def test_so_is_what_the_paths_raise() -> None:
    def find_paths() -> Iterator[str]:
        yield "a"
        raise ImageError("the folder is empty")

    with ReadAhead(find_paths(), lambda path: path, threads=1, ahead=4) as reading:
        reading.raise_failure()
        assert [item.path for item in reading.take(2)] == ["a"]
        with pytest.raises(ImageError, match="the folder is empty"):
            reading.raise_failure()


def test_threads_end_with_it() -> None:
    before = count_threads()
    reading = ReadAhead(map(str, range(1000)), lambda path: path, threads=3, ahead=50)
    with contextlib.suppress(KeyboardInterrupt), reading:
        reading.take(2)
        assert count_threads() > before
        raise KeyboardInterrupt
    assert count_threads() == before
