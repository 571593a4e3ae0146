"""Packets: a group of images as one piece of memory for one upload, and its results as one for one download.

Pixels that are on the device already have a place in the packet there, behind those that are uploaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fpn_engine.tasks import Found, Group, PaddedDetections, PaddedMasks

ALIGNMENT = 16  # bytes: Triton compiles another kernel for pointers that are less aligned


class Fields(NamedTuple):
    """The head of a packet, as views of it.

    Attributes:
        offsets: (N,) int64, where each image begins in the buffer that the packet is uploaded to.
        sizes, image_sizes: (N, 2) int64, height and width of each image as it is and resized.
        counts: (N,) int64, given proposals. boxes: (N, R, 4) float32, these, in pixels of the resized images.
    """

    offsets: Tensor
    sizes: Tensor
    image_sizes: Tensor
    counts: Tensor
    boxes: Tensor


class Written(NamedTuple):
    """A packet to send: its first ``size`` bytes, and images (H, W, 3) on the device with where in it each belongs."""

    size: int
    placed: Sequence[tuple[Tensor, int]] = ()


@dataclass(frozen=True, slots=True)
class PacketForm:
    """Where things lie in a packet: the head, the pixels of images in host memory, the places of those on the device.

    Attributes:
        batch: N, images. slots: R, given proposals per image; 0 for a model that finds its own.
    """

    batch: int
    slots: int = 0

    @property
    def head_bytes(self) -> int:
        return self._ends()[-1]

    def count_bytes(self, group: Group) -> int:
        """Bytes of a whole packet."""
        return self.head_bytes + sum(_align(image.nbytes) for image in group.images)

    def view(self, packet: Tensor) -> Fields:
        """The head of ``packet``, (B,) uint8, B at least ``head_bytes`` and its start aligned."""
        n, r = self.batch, self.slots
        shapes = ((n,), (n, 2), (n, 2), (n,), (n, r, 4))
        types = (torch.int64, torch.int64, torch.int64, torch.int64, torch.float32)
        ends = self._ends()
        parts = []
        for start, size, shape, dtype in zip([0, *ends], self._sizes(), shapes, types, strict=False):
            parts.append(packet[start : start + size].view(dtype).view(shape))
        return Fields(*parts)

    def write(self, packet: Tensor, group: Group, start: int) -> Written:
        """Write a group of at most N images into ``packet``, (B,) uint8 in host memory.

        The rows behind the group's repeat its last image without repeating its pixels.

        Args: start: where in the buffer on the device the packet will begin.
        """
        host = packet.numpy()
        offsets, sizes, image_sizes, counts, boxes = (part.numpy() for part in self.view(packet))
        at = size = self.head_bytes
        placed = []
        rows = len(group.images)
        for row in sorted(range(rows), key=lambda row: isinstance(group.images[row], Tensor)):
            image = group.images[row]
            offsets[row], sizes[row], image_sizes[row] = start + at, image.shape[:2], group.image_sizes[row]
            if isinstance(image, Tensor):
                placed.append((image, at))
            else:
                host[at : at + image.nbytes] = image.reshape(-1)
                size = at + _align(image.nbytes)
            at += _align(image.nbytes)
        counts[:], boxes[:] = 0, 0
        for row, given in enumerate(group.given or ()):
            counts[row], boxes[row, : len(given)] = len(given), given
        for part in (offsets, sizes, image_sizes, counts, boxes):
            part[rows:] = part[rows - 1]
        return Written(size, placed)

    def _sizes(self) -> Sequence[int]:
        n = self.batch
        return 8 * n, 16 * n, 16 * n, 8 * n, 16 * n * self.slots

    def _ends(self) -> list[int]:
        return list(accumulate(map(_align, self._sizes())))


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def pack_result(found: Found) -> Tensor:
    """(N, 4 + 7 D) int32: counts, status, labels, scores and boxes, their bits unchanged; one small copy.

    Of masks (N, 4 + (5 + S^2) K): counts, status, scores, regions and logits.
    """
    n = len(found.counts)
    parts = [found.counts[:, None], found.status[:, None]]
    if isinstance(found, PaddedMasks):
        parts += [found.scores, found.regions.reshape(n, -1), found.masks.reshape(n, -1)]
    else:
        parts += [found.labels, found.scores, found.boxes.reshape(n, -1)]
    return torch.cat([part.contiguous().view(torch.int32) for part in parts], dim=1)


def unpack_result(packed: Tensor) -> PaddedDetections:
    """What :func:`pack_result` packed, as tensors of their own."""
    slots = (packed.shape[1] - 4) // 7
    counts, status, labels, scores, boxes = (
        part.clone(memory_format=torch.contiguous_format)
        for part in packed.split([2, 2, 2 * slots, slots, 4 * slots], dim=1)
    )
    return PaddedDetections(
        boxes.view(torch.float32).view(-1, slots, 4),
        scores.view(torch.float32),
        labels.view(torch.int64),
        counts.view(torch.int64)[:, 0],
        status.view(torch.int64)[:, 0],
    )


def unpack_masks(packed: Tensor, mask_size: int) -> PaddedMasks:
    """What :func:`pack_result` packed of masks, as views of it where their types allow."""
    slots = (packed.shape[1] - 4) // (5 + mask_size**2)
    counts, status, scores, regions, masks = packed.split([2, 2, slots, 4 * slots, slots * mask_size**2], dim=1)
    counts, status = (part.clone(memory_format=torch.contiguous_format) for part in (counts, status))
    return PaddedMasks(
        regions.view(torch.float32).unflatten(1, (slots, 4)),
        scores.view(torch.float32),
        masks.view(torch.float32).unflatten(1, (slots, mask_size, mask_size)),
        counts.view(torch.int64)[:, 0],
        status.view(torch.int64)[:, 0],
    )
