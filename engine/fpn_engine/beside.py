"""Work beside the current CUDA stream: forked from it and joined to it by events, in a captured graph a branch.

Only who has two streams to himself says so (:func:`using`); elsewhere the work is done in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # imported when there is a stream, so that this costs nothing without
    import torch

T = TypeVar("T")
# Of the streams: small work goes first wherever the GPU has room, or it would wait for the end of what is large.
PRIORITY = -1
_stream: ContextVar[torch.cuda.Stream | None] = ContextVar("beside", default=None)


@contextmanager
def using(stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside, and in this thread alone, what is begun runs on ``stream``, which nobody else uses."""
    token = _stream.set(stream)
    try:
        yield
    finally:
        _stream.reset(token)


def begin(work: Callable[[], T]) -> Callable[[], T]:
    """Begin ``work`` beside the current stream; what it returns gives the result, to be asked for once.

    The work follows all that the current stream was given before, and what was begun earlier, whose results it may ask
    for. The caller has to ask for the last of what it began, and to keep until then what is read: so no memory is given
    back too early, and no branch of a graph is left open. Without a stream beside, the work is done when its result is
    asked for.
    """
    stream = _stream.get()
    if stream is None:
        return work
    import torch

    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        result = work()

    def join() -> T:
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        return result

    return join
