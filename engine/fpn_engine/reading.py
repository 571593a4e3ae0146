"""Reading ahead: images are decoded in other threads while those before them are computed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, Self, TypeVar

from fpn_engine.errors import BackendError, FpnEngineError
from fpn_engine.image_file import MAX_PIXELS

if TYPE_CHECKING:
    from fpn_engine.images import ImageLike
    from fpn_engine.tasks import AnyPixels

T = TypeVar("T")


class ReadImage(Protocol):
    """What makes pixels of an image, as :func:`fpn_engine.images.to_array` does."""

    def __call__(self, image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> AnyPixels: ...


class ReadItem(NamedTuple, Generic[T]):
    """A path, and what was read there or the error that was met."""

    path: str | os.PathLike[str]
    result: T | FpnEngineError


class ReadAhead(Generic[T]):
    """Reads ``paths`` in order, at most ``ahead`` beyond what was taken; a context manager, which ends its threads.

    Args:
        read: is called in ``threads`` other threads. An FpnEngineError that it raises is a result; anything else, and a
            BackendError, which is no fault of the file, ends the items before that path, as does what iterating
            ``paths`` raises.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        read: Callable[[str | os.PathLike[str]], T],
        *,
        threads: int,
        ahead: int,
    ) -> None:
        self._paths = iter(paths)
        self._read = read
        self._ahead = ahead
        self._begun: deque[tuple[str | os.PathLike[str], Future[T]]] = deque()
        self._end: Exception | None = None  # what iterating raised, StopIteration as a rule
        self._failure: Exception | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fpn-engine-read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, count: int) -> list[ReadItem[T]]:
        """The next ``count`` items; fewer at the end, which :meth:`raise_failure` tells from a failure."""
        taken: list[ReadItem[T]] = []
        while len(taken) < count and self._failure is None:
            self._begin(count - len(taken) + self._ahead)
            if not self._begun:
                self._failure = None if isinstance(self._end, StopIteration) else self._end
                break
            path, future = self._begun.popleft()
            try:
                taken.append(ReadItem(path, future.result()))
            except BackendError as error:
                self._failure = error
            except FpnEngineError as error:
                taken.append(ReadItem(path, error))
            except Exception as error:
                self._failure = error
        return taken

    def raise_failure(self) -> None:
        """Raise what ended the items early, if anything did."""
        if self._failure is not None:
            raise self._failure

    def _begin(self, count: int) -> None:
        """Have ``count`` items begun, if there are as many."""
        while len(self._begun) < count and self._end is None:
            try:
                path = next(self._paths)
            except Exception as error:
                self._end = error
            else:
                self._begun.append((path, self._pool.submit(self._read, path)))
