"""Transport: what the runtime asks of a device; CUDA's is in :mod:`fpn_engine.runtime.cuda`, tests have others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor


class Event(Protocol):
    """A point in a stream of work."""

    def synchronize(self) -> None:
        """Wait until all before it is done. Raises BackendError if the device failed."""
        ...


class Transport(Protocol):
    """One stream for uploads and one that computes; nothing here waits for the device but an event.

    Work of the computing stream runs in the order in which it is given, and sees the uploads given before it.
    """

    def computing(self) -> AbstractContextManager[None]:
        """The device and its computing stream are the current ones inside."""
        ...

    def host_buffer(self, size: int) -> Tensor:
        """(size,) uint8 in memory that the device reads and writes by itself."""
        ...

    def device_buffer(self, size: int) -> Tensor:
        """(size,) uint8 on the device."""
        ...

    def upload(self, source: Tensor, target: Tensor) -> Event:
        """Copy from a host buffer to the device, beside what computes; the event is when ``source`` has been read."""
        ...

    def place(self, image: Tensor, target: Tensor) -> None:
        """Copy pixels that are on the device, of any strides, as uploads are; the next upload's event is behind it."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy on the device, in the computing stream."""
        ...

    def launch(self, run: Callable[[], Tensor]) -> Tensor:
        """Give the operations of ``run`` to the computing stream, one by one."""
        ...

    def download(self, source: Tensor, target: Tensor) -> Event:
        """Copy into a host buffer, in the computing stream; the event is when it is there."""
        ...

    def keep(self, source: Tensor) -> tuple[Tensor, Event]:
        """A copy that stays on the device, made in the computing stream; the event is when it is there."""
        ...

    def hand_over(self, kept: Tensor) -> None:
        """Let the caller's current stream read what :meth:`keep` gave, and after its event alone."""
        ...

    def release(self) -> None:
        """Give memory back that is kept for later use."""
        ...
