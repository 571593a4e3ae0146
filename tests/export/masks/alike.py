"""Whether two forms of a mask-proposal model propose the same masks."""

from __future__ import annotations

from torch import Tensor

from fpn_engine.masks.paste import paste_masks
from fpn_engine.tasks import PaddedMasks


def assert_same_masks(regions: Tensor, masks: Tensor, expected: PaddedMasks, size: tuple[int, int]) -> None:
    """Each proposal of ``expected`` is there, and its mask, pasted into an image of ``size``, has an IoU of 0.99.

    Rounding may swap neighbours, and change which of equals is the last.
    """
    for image in range(len(regions)):
        slots = {tuple(region): slot for slot, region in enumerate(regions[image].tolist())}
        own = [slots.get(tuple(region)) for region in expected.regions[image].tolist()]
        lost = [slot for slot, place in enumerate(own) if place is None]
        assert all(expected.scores[image, slot] < expected.scores[image, -1] + 1e-5 for slot in lost)
        assert len(lost) <= 1
        there = [slot for slot in range(len(own)) if slot not in lost]
        swapped = [own[slot] for slot in there]
        covered = expected.regions[image, there]
        ours, theirs = (
            paste_masks(part, covered, size) for part in (expected.masks[image, there], masks[image][swapped])
        )
        union, both = (ours | theirs).sum(dim=(1, 2)), (ours & theirs).sum(dim=(1, 2))
        assert union.count_nonzero() > len(union) / 2, "else there would be nothing to compare"
        assert (both >= 0.99 * union).all()
