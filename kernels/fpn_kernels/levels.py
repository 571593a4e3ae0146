"""RoIs on the pyramid level that their size asks for (Lin et al. 2017, sec. 4.2, eq. 1); shared by both poolings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.checks import FLOATS, require, require_device, require_dtype, require_shape

# eq. 1 takes the floor; a box of exactly canonical_size must not fall a level by rounding.
LEVEL_EPS = 1e-6

# (N, C, H, W) features, (R, 5) finite RoIs in pixels and the level's stride to (R, S, S, C).
PoolLevel = Callable[[Tensor, Tensor, float], Tensor]


def assign_levels(
    boxes: Tensor, min_level: int, max_level: int, canonical_level: int = 4, canonical_size: float = 224
) -> Tensor:
    """The pyramid level of each box, eq. 1: floor(k0 + log2(sqrt(w h) / 224) + 1e-6), clamped.

    Args: boxes: (..., 4) float32 in pixels of the network's input. Returns: (...) int64, min_level..max_level.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    size = (sides[..., 0] * sides[..., 1]).sqrt()
    level = (canonical_level + torch.log2(size / canonical_size) + LEVEL_EPS).floor()
    return level.nan_to_num(min_level).clamp(min_level, max_level).to(torch.int64)


def pool_by_level(
    pool_level: PoolLevel,
    features: Sequence[Tensor],
    rois: Tensor,
    counts: Tensor | None,
    output_size: int,
    strides: Sequence[float],
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> Tensor:
    """Pool each RoI from its own level: (R, C, S, S) in channels_last order, zeros where a slot is empty or not finite.

    Raises: ValueError for a batch index outside the batch.
    """
    n, c = features[0].shape[:2]
    chosen_by_level = split_by_level(n, len(features), rois, counts, min_level, canonical_level, canonical_size)
    absent = torch.ones(len(rois), dtype=torch.bool, device=rois.device)
    absent[torch.cat(chosen_by_level)] = False
    out = features[0].new_empty(len(rois), output_size, output_size, c)
    out[absent] = 0
    for feature, stride, chosen in zip(features, strides, chosen_by_level, strict=True):
        if len(chosen):
            out.index_copy_(0, chosen, pool_level(feature, rois[chosen], stride))
    return out.permute(0, 3, 1, 2)


def split_by_level(
    n: int,
    levels: int,
    rois: Tensor,
    counts: Tensor | None,
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> list[Tensor]:
    """Which RoIs each level has, of a batch of ``n``; empty slots and RoIs that are not finite are on none.

    Raises: ValueError for a batch index outside the batch.
    """
    valid = rois.isfinite().all(dim=1)
    if counts is not None:
        slots = len(rois) // max(n, 1)
        valid &= (torch.arange(slots, device=rois.device) < counts[:, None]).view(-1)
    if bool((((rois[:, 0] < 0) | (rois[:, 0] >= n)) & valid).any()):
        raise ValueError(f"rois name an image outside the batch of {n}")
    max_level = min_level + levels - 1
    assigned = assign_levels(rois[:, 1:], min_level, max_level, canonical_level, canonical_size)
    return [((assigned == level) & valid).nonzero()[:, 0] for level in range(min_level, max_level + 1)]


def check_pooling(
    features: Sequence[Tensor], rois: Tensor, counts: Tensor | None, output_size: int, strides: Sequence[float]
) -> None:
    """Raise ValueError unless the arguments that every pooling takes fit each other."""
    require(len(features) >= 1, "features must hold at least one level")
    require(len(features) == len(strides), "need one stride per level, not {} for {}", len(strides), len(features))
    require(features[0].ndim == 4, "features must have shape (N, C, H, W), not {}", tuple(features[0].shape))
    n, c = features[0].shape[:2]
    for level in features:
        require_shape("features", level, n, c, None, None)
        require_dtype("features", level, *FLOATS)
        require_dtype("features", level, features[0].dtype)
        require(level.shape[2] * level.shape[3] > 0, "features must have cells, not shape {}", tuple(level.shape))
    require_shape("rois", rois, None, 5)
    require_dtype("rois", rois, torch.float32)
    require_device(**{f"features[{i}]": level for i, level in enumerate(features)}, rois=rois)
    if counts is not None:
        require_shape("counts", counts, n)
        require_dtype("counts", counts, torch.int64)
        require_device(rois=rois, counts=counts)
        r = rois.shape[0]
        require(r == r // max(n, 1) * n, "{} rois do not divide among {} images", r, n)
    require(output_size >= 1, "output_size must be at least 1, not {}", output_size)


def number_boxes(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """(R, 5) float32 rois with batch index; one (R_n, 4) tensor per image is numbered, a tensor is left as it is."""
    if isinstance(boxes, Tensor):
        return boxes
    numbered = [F.pad(box.to(torch.float32), (1, 0), value=float(n)) for n, box in enumerate(boxes)]
    return torch.cat(numbered) if numbered else input.new_zeros(0, 5, dtype=torch.float32)
