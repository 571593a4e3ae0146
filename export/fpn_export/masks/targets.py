"""Label assignment: which locations learn which object (Lin et al. 2017, appendix A).

An object's scale is the larger of its width and height. It belongs to the one level and head whose object size is
nearest in log space, the coarsest or finest where there is none beyond. There, a location within 2^k pixels of its
centre, along each axis, is positive: one cell to either side. All other locations of all heads are negative.

The paper leaves open: which object a location learns that is near the centres of several (here the one whose centre is
nearest, the earlier of equals), and where a location lies (here at (x 2^k, y 2^k) as the anchors do). Width and height
are those of the mask's bounding box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpn_engine.masks.regions import Regions
from fpn_export.training.matching import BACKGROUND
from fpn_export.training.sampling import sample_balanced

POSITIVE_SHARE = 0.25  # positives to negatives 1:3
PAPER_EXAMPLES = 128  # per image: 2048 in a mini-batch of 16
SCALE_EPS = 1e-4  # octaves: a scale half-way between two sizes goes to the larger, whatever float32 rounds


class Locations(NamedTuple):
    """All location-head pairs of an image, level by level in the order (y, x, head): each (M,) int64."""

    levels: Tensor
    heads: Tensor
    y: Tensor
    x: Tensor


class MaskTargets(NamedTuple):
    """Sampled examples of a batch, image by image, positives first in each.

    Attributes:
        places: (R, 4) int64: image, position of the level, y, x. heads: (R,) int64.
        objects: (R,) int64, the object of the image that is learnt, BACKGROUND for negatives.
    """

    places: Tensor
    heads: Tensor
    objects: Tensor


def list_locations(grids: Sequence[Sequence[int]], heads: int, device: torch.device | str = "cpu") -> Locations:
    """The locations of levels of ``grids`` cells (H_l, W_l), each once for every head."""
    parts = []
    for level, (h, w) in enumerate(grids):
        axes = (torch.arange(size, device=device) for size in (h, w, heads))
        y, x, head = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
        parts.append((torch.full_like(y, level), head, y, x))
    return Locations(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def assign_sizes(regions: Regions, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Position of the level, and head, (M,) int64 each, that (M, 4) boxes belong to."""
    scales = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1)
    sizes = regions.object_sizes.flatten()
    octaves = (torch.log2(scales)[:, None] - torch.log2(sizes)).abs()
    # Rounded, so that what lies half-way is told by the order, larger sizes first.
    order = sizes.argsort(descending=True)
    nearest = order[(octaves / SCALE_EPS).round()[:, order].argmin(dim=1)]
    heads = regions.object_sizes.shape[1]
    return nearest // heads, nearest % heads


def match_locations(regions: Regions, locations: Locations, boxes: Tensor) -> Tensor:
    """What each location learns of an image whose objects have (M, 4) float32 ``boxes``: (L,) int64, or BACKGROUND."""
    if len(boxes) == 0:
        return torch.full_like(locations.y, BACKGROUND)
    level, head = assign_sizes(regions, boxes)
    centres = 0.5 * (boxes[:, :2] + boxes[:, 2:])
    points = regions.locate(locations.levels, locations.y, locations.x)
    offsets = points[:, None] - centres
    own = (locations.levels[:, None] == level) & (locations.heads[:, None] == head)
    near = own & (offsets.abs() <= regions.strides[locations.levels][:, None, None]).all(dim=2)
    distance = offsets.square().sum(dim=2).masked_fill(~near, torch.inf)
    nearest = distance.argmin(dim=1)
    return nearest.masked_fill(~near.any(dim=1), BACKGROUND)


def assign_examples(
    regions: Regions,
    grids: Sequence[Sequence[int]],
    boxes: Sequence[Tensor],
    count: int = PAPER_EXAMPLES,
    generator: torch.Generator | None = None,
) -> MaskTargets:
    """Match all locations of each image and draw ``count`` of them, a quarter of them positive where there are enough.

    Args:
        grids: cells of each level. boxes: of each image's objects, (M_n, 4) float32 in pixels of the resized image.
        generator: None takes torch's global one.
    """
    locations = list_locations(grids, regions.object_sizes.shape[1], regions.strides.device)
    places, heads, objects = [], [], []
    for image, of_image in enumerate(boxes):
        matched = match_locations(regions, locations, of_image)
        drawn = torch.cat(sample_balanced(matched, count, POSITIVE_SHARE, generator))
        number = torch.full_like(drawn, image)
        places.append(torch.stack([number, locations.levels[drawn], locations.y[drawn], locations.x[drawn]], dim=1))
        heads.append(locations.heads[drawn])
        objects.append(matched[drawn])
    return MaskTargets(torch.cat(places), torch.cat(heads), torch.cat(objects))
