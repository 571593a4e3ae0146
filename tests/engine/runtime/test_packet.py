"""Packets and packed results: what goes in comes out, aligned, whatever was in the memory before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fpn_engine.pipeline import PaddedDetections
from fpn_engine.runtime.packet import ALIGNMENT, PacketForm, pack_result, unpack_result
from fpn_engine.runtime.runner import Group

SHAPES = [(5, 7, 3), (1, 1, 3), (4, 9, 3)]


@pytest.mark.parametrize("batch", [3, 4, 8])
def test_a_packet_holds_its_group(batch: int) -> None:
    rng = np.random.default_rng(batch)
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in SHAPES]
    given = [rng.random((n, 4), dtype=np.float32) for n in (2, 0, 5)]
    group = Group(images, [(10, 14), (20, 20), (8, 18)], given)
    form = PacketForm(batch, 6)
    region = torch.full((100 * ALIGNMENT + form.count_bytes(group),), 0xA5, dtype=torch.uint8)
    start = 100 * ALIGNMENT
    assert form.write(region[start:], group, start) == (form.count_bytes(group), [])

    offsets, sizes, image_sizes, counts, boxes = form.view(region[start:])
    for row in range(batch):
        number = min(row, 2)
        h, w = sizes[row].tolist()
        at = int(offsets[row])
        assert at % ALIGNMENT == 0
        np.testing.assert_array_equal(region[at : at + 3 * h * w].view(h, w, 3).numpy(), images[number])
        assert tuple(image_sizes[row].tolist()) == group.image_sizes[number]
        assert int(counts[row]) == len(given[number])
        np.testing.assert_array_equal(boxes[row, : counts[row]].numpy(), given[number])
        assert not boxes[row, counts[row] :].any()


@pytest.mark.parametrize("on_device", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_pixels_on_the_device_have_a_place_behind_what_is_uploaded(on_device: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in SHAPES]
    images = [torch.from_numpy(a) if row in on_device else a for row, a in enumerate(arrays)]
    group = Group(images, [(10, 14), (20, 20), (8, 18)])
    form = PacketForm(4)
    packet = torch.full((form.count_bytes(group),), 0xA5, dtype=torch.uint8)
    size, placed = form.write(packet, group, 0)
    assert bool((packet[size:] == 0xA5).all()), "what is not uploaded is not written"
    assert size == form.head_bytes + sum(-(-a.nbytes // 16) * 16 for a in arrays) - sum(
        -(-arrays[row].nbytes // 16) * 16 for row in on_device
    )
    assert [image is images[row] for (image, _), row in zip(placed, on_device, strict=True)] == [True] * len(on_device)
    for image, at in placed:
        packet[at : at + image.nbytes].view(image.shape).copy_(image)
    offsets, sizes, *_ = form.view(packet)
    for row in range(4):
        at, (h, w) = int(offsets[row]), sizes[row].tolist()
        assert at % ALIGNMENT == 0
        np.testing.assert_array_equal(packet[at : at + 3 * h * w].view(h, w, 3).numpy(), arrays[min(row, 2)])


def test_every_part_of_the_head_is_aligned() -> None:
    packet = torch.zeros(4096, dtype=torch.uint8)
    for batch in (1, 3, 5):
        for part in PacketForm(batch, 3).view(packet):
            assert (part.data_ptr() - packet.data_ptr()) % ALIGNMENT == 0


def test_a_model_with_an_rpn_is_given_no_boxes() -> None:
    group = Group([np.zeros((2, 2, 3), np.uint8)], [(2, 2)])
    form = PacketForm(1)
    packet = torch.zeros(form.count_bytes(group), dtype=torch.uint8)
    form.write(packet, group, 0)
    assert form.view(packet).boxes.shape == (1, 0, 4)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("slots", [1, 20, 21])
def test_results_keep_their_bits(slots: int, images: int) -> None:
    generator = torch.Generator().manual_seed(slots)
    found = PaddedDetections(
        torch.randn(images, slots, 4, generator=generator),
        torch.rand(images, slots, generator=generator),
        torch.randint(1, 91, (images, slots), generator=generator),
        torch.tensor([slots, 0, 1][:images]),
        torch.tensor([0, 1, 0][:images]),
    )
    found.boxes[0, 0, 0] = -0.0
    packed = pack_result(found)
    assert (packed.dtype, packed.shape) == (torch.int32, (images, 4 + 7 * slots))
    expected = [part.clone() for part in found]
    unpacked = unpack_result(packed)
    packed.zero_()  # it has memory of its own
    for ours, theirs in zip(unpacked, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
