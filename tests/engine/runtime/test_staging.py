"""The ring: slots in turn, nothing overwritten too early, no wait but for room, results that nobody fetched kept."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from fpn_engine.pipeline import PaddedDetections
from fpn_engine.runtime.packet import Written, pack_result
from fpn_engine.runtime.staging import SLOTS, Arriving, StagingRing
from tests.engine.runtime.stand_ins import POISON, DeferredTransport


def make_result(number: int) -> Tensor:
    """Of one image with one box of that label."""
    one = torch.ones(1, dtype=torch.int64)
    return pack_result(PaddedDetections(torch.ones(1, 1, 4), torch.ones(1, 1), one[None] * number, one, one * 0))


class Sums:
    """Groups of bytes through a ring; the result is the sum of a group's region when the device gets to it."""

    def __init__(self, transport: DeferredTransport, capacity: int = 64) -> None:
        self.transport = transport
        self.ring = StagingRing(transport, capacity)

    def submit(self, value: int) -> Arriving:
        slot = self.ring.acquire()
        slot.packet[:4] = value
        slot.upload(Written(4))
        packed = make_result(0)

        def compute() -> None:
            packed.copy_(make_result(int(slot.region[:4].sum())))

        self.transport.give("compute", compute)
        return slot.download(packed, 1)


@pytest.fixture(params=[False, True], ids=["late uploads", "early uploads"])
def transport(request: pytest.FixtureRequest) -> DeferredTransport:
    return DeferredTransport(early_uploads=request.param)


@pytest.mark.parametrize("order", [1, -1])
def test_each_group_gets_its_own_result(transport: DeferredTransport, order: int) -> None:
    sums = Sums(transport)
    arriving = [sums.submit(value) for value in range(10)]
    found = [int(a.wait().labels) for a in arriving[::order]][::order]
    assert found == [4 * value for value in range(10)]


def test_only_a_full_ring_waits(transport: DeferredTransport) -> None:
    sums = Sums(transport)
    first = [sums.submit(value) for value in range(SLOTS)]
    assert transport.waits == 0
    assert transport.queued >= 2 * SLOTS
    sums.submit(7)
    assert transport.waits == 1  # for the first group alone
    assert transport.queued >= 2 * SLOTS
    assert int(first[1].wait().labels) == 4


def test_a_result_is_waited_for_once(transport: DeferredTransport) -> None:
    sums = Sums(transport)
    arriving = sums.submit(3)
    assert arriving.wait() is arriving.wait()
    assert transport.waits == 1


def test_results_outlive_their_slot(transport: DeferredTransport) -> None:
    sums = Sums(transport)
    arriving = sums.submit(1)
    found = arriving.wait()
    for value in range(2, 12):
        sums.submit(value)
    transport.drain()
    assert int(found.labels) == int(arriving.wait().labels) == 4


def test_several_threads_may_wait_for_one_result(transport: DeferredTransport) -> None:
    sums = Sums(transport)
    arriving = sums.submit(5)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(int(arriving.wait().labels))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 8
    assert transport.waits == 1


def test_a_slot_whose_group_failed_is_waited_for_too() -> None:
    transport = DeferredTransport()
    ring = StagingRing(transport, 64)
    slots = [ring.acquire() for _ in range(SLOTS)]
    slots[0].packet[:4] = 9
    slots[0].upload(Written(4))  # and then something fails
    assert ring.acquire() is slots[0]
    assert slots[0].region[:4].tolist() == [9] * 4  # the upload had read the packet before it is written again


def test_a_failure_stays_with_its_group() -> None:
    class Broken(DeferredTransport):
        def download(self, source: Tensor, target: Tensor):  # type: ignore[no-untyped-def]
            event = super().download(source, target)
            event.synchronize = self.fail  # type: ignore[method-assign]
            return event

        def fail(self) -> None:
            raise RuntimeError("the device is gone")

    sums = Sums(Broken())
    arriving = sums.submit(1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gone"):
            arriving.wait()


def test_growing_moves_everything_and_loses_nothing(transport: DeferredTransport) -> None:
    sums = Sums(transport)
    before = sums.ring.pixels
    arriving = [sums.submit(value) for value in (1, 2, 3)]
    assert sums.ring.fits(64)
    assert not sums.ring.fits(65)
    sums.ring.grow(65)
    assert sums.ring.pixels is not before
    assert sums.ring.fits(128)
    assert len(sums.ring.pixels) == SLOTS * 128
    assert bool((sums.ring.pixels == POISON).all())
    arriving += [sums.submit(value) for value in (4, 5)]
    assert [int(a.wait().labels) for a in arriving] == [4, 8, 12, 16, 20]


def test_regions_do_not_overlap() -> None:
    ring = StagingRing(DeferredTransport(), 50)  # rounded up, for alignment
    slots = [ring.acquire() for _ in range(SLOTS)]
    for value, slot in enumerate(slots):
        slot.region[:] = value
        assert slot.region.data_ptr() == ring.pixels.data_ptr() + slot.start
        assert slot.start % 16 == 0
    assert [set(slot.region.tolist()) for slot in slots] == [{0}, {1}, {2}]


def test_no_memory_to_grow_is_no_end() -> None:
    transport = DeferredTransport()
    sums = Sums(transport)
    allocate = transport.device_buffer

    def refuse(size: int) -> Tensor:
        raise MemoryError

    transport.device_buffer = refuse  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        sums.ring.grow(100)
    assert not sums.ring.fits(1)
    transport.device_buffer = allocate  # type: ignore[method-assign]
    sums.ring.grow(100)
    assert int(sums.submit(2).wait().labels) == 8


def test_what_is_on_the_device_is_there_when_the_upload_is(transport: DeferredTransport) -> None:
    ring = StagingRing(transport, 64)
    slot = ring.acquire()
    slot.packet[:4] = 9
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2).permute(1, 2, 0)  # as a decoder leaves it, in planes
    slot.upload(Written(4, [(image, 16)]))
    transport.download(slot.region, torch.empty(64, dtype=torch.uint8)).synchronize()
    assert slot.region[:4].tolist() == [9] * 4
    assert slot.region[16:28].view(2, 2, 3).equal(image)
    assert bool((slot.region[28:] == POISON).all())
    assert transport.log[:2] == ["place", "upload"]
