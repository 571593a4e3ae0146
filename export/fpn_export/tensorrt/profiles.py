"""Optimisation profiles: the ranges of input shapes that an engine is built for, and the best shape of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fpn_engine.errors import BackendError
from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_engine.resizing import padded_size, resized_size
from fpn_engine.spec import ModelSpec

MOST_IMAGES = 8  # at once, unless said otherwise
PHOTOGRAPH = (480, 640)  # the shape of most; the engine is tuned for it, lying and upright
GIVEN_PROPOSALS = 2000  # of an image that a Fast R-CNN is given; more are run in pieces


class Profile(NamedTuple):
    """Shapes of one input: the smallest, the one to be fastest at, and the largest."""

    low: tuple[int, ...]
    best: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """How many images at once: up to ``most``, fastest at ``best``."""

    best: int = 1
    most: int = MOST_IMAGES

    def __post_init__(self) -> None:
        if not 1 <= self.best <= self.most:
            raise BackendError(f"a batch of {self.best} to {self.most} images is none; take 1 <= best <= most")


def image_profiles(spec: AnySpec, batches: Batches, sizes: tuple[tuple[int, int], ...] = ()) -> list[Profile]:
    """Profiles of ``image`` (N, 3, H, W).

    Without ``sizes`` one for pictures that lie and one for upright ones, together all that the spec's size rule gives;
    with them one for each padded size and nothing else.

    Raises: BackendError for a size that is no multiple of the spec's divisor.
    """
    if sizes:
        return [_profile(batches, size, size, size) for size in _checked(sizes, spec.size_divisor)]
    step = spec.size_divisor
    short, long = padded_size((spec.min_size, spec.max_size), step)
    h, w = padded_size(resized_size(*PHOTOGRAPH, spec.min_size, spec.max_size), step)
    # Either the short side is min_size and the long one at least that, or the long side is max_size.
    low, best, high = (step, min(short, long)), (h, w), (short, max(short, long))
    lying = _profile(batches, low, best, high)
    return [lying, _profile(batches, low[::-1], best[::-1], high[::-1])]


def roi_profile(spec: ModelSpec, batches: Batches) -> Profile:
    """The profile of ``roi_rows`` (R, S * S * C): all proposals of a batch."""
    rois = spec.rpn_post_nms_top_n_test if spec.has_rpn else GIVEN_PROPOSALS
    width = spec.box_roi_pool.output_size**2 * spec.feature_channels
    return Profile((1, width), (rois * batches.best, width), (rois * batches.most, width))


def window_profile(spec: MaskSpec, head: int, batches: Batches) -> Profile:
    """The profile of ``window_rows`` (R, k^2 C) of a head: all winners of a batch may be its own."""
    width = spec.heads[head].kernel ** 2 * spec.feature_channels
    return Profile((1, width), (spec.masks_per_img * batches.best, width), (spec.masks_per_img * batches.most, width))


def _profile(batches: Batches, low: tuple[int, int], best: tuple[int, int], high: tuple[int, int]) -> Profile:
    return Profile((1, 3, *low), (batches.best, 3, *best), (batches.most, 3, *high))


def _checked(sizes: tuple[tuple[int, int], ...], divisor: int) -> tuple[tuple[int, int], ...]:
    for size in sizes:
        if min(size) < divisor or any(side % divisor for side in size):
            raise BackendError(f"the size {size[0]}x{size[1]} is not padded; take multiples of {divisor}")
    return sizes
