"""Staging: a ring of places in pinned memory, so that one group is written while others travel and compute."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fpn_engine.runtime.packet import ALIGNMENT, Written, unpack_masks, unpack_result
from fpn_engine.runtime.transport import Event, Transport
from fpn_engine.tasks import PaddedDetections, PaddedMasks

SLOTS = 3  # one is written, one travels, one computes


class Arriving:
    """A result on its way into a slot's memory, which it leaves at the first ``wait``, from whatever thread."""

    def __init__(self, event: Event, packed: Tensor, rows: int) -> None:
        self._event = event
        self._packed = packed
        self._rows = rows
        self._found: PaddedDetections | None = None
        self._lock = threading.Lock()

    def wait(self) -> PaddedDetections:
        with self._lock:
            if self._found is None:
                self._event.synchronize()
                self._found = unpack_result(self._packed[: self._rows])
            return self._found


class Staying:
    """Masks that stay on the device: larger than is worth a download, and pasted there."""

    def __init__(self, transport: Transport, packed: Tensor, rows: int, mask_size: int) -> None:
        self._transport = transport
        self._packed, self.event = transport.keep(packed)
        self._rows, self._mask_size = rows, mask_size

    def wait(self) -> PaddedMasks:
        self.event.synchronize()
        self._transport.hand_over(self._packed)
        return unpack_masks(self._packed[: self._rows], self._mask_size)


class Slot:
    """One place of the ring: pinned memory for a packet and a result, and the packet's region on the device.

    Attributes:
        packet: (capacity,) uint8 on the host. region: the same on the device; start: where it begins in the buffer.
    """

    def __init__(self, transport: Transport, pixels: Tensor, start: int, capacity: int) -> None:
        self.packet = transport.host_buffer(capacity)
        self.start = start
        self.region = pixels[start : start + capacity]
        self._transport = transport
        self._result = transport.host_buffer(0)
        self._arriving: Arriving | None = None
        self._read: Event | None = None

    def upload(self, written: Written) -> None:
        """Send the packet, and put what is on the device into its places."""
        for image, at in written.placed:
            self._transport.place(image, self.region[at : at + image.nbytes].view(image.shape))
        self._read = self._transport.upload(self.packet[: written.size], self.region[: written.size])

    def download(self, packed: Tensor, rows: int) -> Arriving:
        """Bring back what :func:`pack_result` made; its first ``rows`` rows count."""
        size = packed.numel() * packed.element_size()
        if self._result.numel() < size:
            self._result = self._transport.host_buffer(size)
        target = self._result[:size].view(packed.dtype).view(packed.shape)
        self._arriving = Arriving(self._transport.download(packed, target), target, rows)
        return self._arriving

    def keep(self, packed: Tensor, rows: int, mask_size: int) -> Staying:
        """Leave on the device what :func:`pack_result` made of masks; its first ``rows`` rows count."""
        staying = Staying(self._transport, packed, rows, mask_size)
        self._read = staying.event
        return staying

    def free(self) -> None:
        """Wait until the device has done with this place, and move its result out if nobody has yet."""
        if self._arriving is not None:
            self._arriving.wait()
        elif self._read is not None:  # masks stayed, or something failed between upload and download
            self._read.synchronize()
        self._arriving = self._read = None


class StagingRing:
    """Slots that are taken in turn; the one before the last may still compute.

    All regions lie in one buffer, ``pixels``: a captured graph reads them through the one address that it knows, and
    the packet's offsets say where. Not to be used by two threads at once.

    Args: capacity: bytes of a packet to begin with.
    """

    def __init__(self, transport: Transport, capacity: int, slots: int = SLOTS) -> None:
        self._transport = transport
        self._slots = slots
        self._next = 0
        self._allocate(capacity)

    def fits(self, size: int) -> bool:
        """Whether there is room for packets of ``size`` bytes."""
        return size <= self._capacity

    def grow(self, size: int) -> None:
        """Make room for packets of ``size`` bytes, at least twice as much as before; ``pixels`` is another buffer."""
        for slot in self._ring:
            slot.free()
        self._allocate(max(size, 2 * self._capacity))

    def acquire(self) -> Slot:
        """The next slot; waits for the group that had it before."""
        slot = self._ring[self._next]
        slot.free()
        self._next = (self._next + 1) % self._slots
        return slot

    def _allocate(self, capacity: int) -> None:
        capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
        self._ring: list[Slot] = []  # the old memory goes before the new is taken, which may fail
        self._capacity = 0
        self.pixels = torch.empty(0, dtype=torch.uint8)
        self.pixels = self._transport.device_buffer(self._slots * capacity)
        starts = range(0, self._slots * capacity, capacity)
        self._ring = [Slot(self._transport, self.pixels, start, capacity) for start in starts]
        self._capacity = capacity
