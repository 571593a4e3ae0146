"""The pipeline's stages by name, for whoever times them; nobody does so by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

PREPROCESS, TRUNK, PROPOSALS = "preprocess", "trunk", "proposals"
POOLING, BOX_HEAD, DETECTIONS = "RoI pooling", "box head", "detections"
STAGES = (PREPROCESS, TRUNK, PROPOSALS, POOLING, BOX_HEAD, DETECTIONS)

Watch = Callable[[str], AbstractContextManager[object]]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


def stage(name: str) -> AbstractContextManager[object]:
    """What a stage runs in."""
    watch = _watch.get()
    return nullcontext() if watch is None else watch(name)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Inside, and in this thread alone, each stage runs in ``watch(name)``."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
