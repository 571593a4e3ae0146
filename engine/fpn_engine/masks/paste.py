"""Paste: masks resized into their regions of the image and cut at a probability (He et al. 2017, sec. 3).

A mask is resized bilinearly, half-pixel centres, edges repeated; outside of its region there is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_CELLS = 1 << 25  # pixels that are pasted at a time: 128 MB of float32


def _axis_weights(low: Tensor, high: Tensor, pixels: range, cells: int) -> Tensor:
    """(K, pixels, cells) float32: how much each of a mask's cells is worth at each pixel along one axis."""
    pixel = torch.arange(pixels.start, pixels.stop, dtype=torch.float32, device=low.device) + 0.5
    position = (pixel - low[:, None]) / (high - low)[:, None] * cells
    inside = (position >= 0) & (position < cells)
    centre = (position - 0.5).clamp(0, cells - 1)[..., None]
    weight = (1 - (centre - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
    return weight * inside[..., None]


def paste_masks(masks: Tensor, regions: Tensor, size: Sequence[int], threshold: float = 0.5) -> Tensor:
    """Binary masks at image resolution.

    Args:
        masks: (K, S, S) logits. regions: (K, 4) float32, x1 y1 x2 y2 in pixels of the image; they may reach beyond it.
        size: height and width of the image. threshold: least probability of a pixel of the object.
    Returns: (K, H, W) bool, on the device of ``masks``; nothing is read back. What is not finite is False.
    """
    if len(masks) == 0:
        return torch.zeros(0, *size, dtype=torch.bool, device=masks.device)
    return torch.cat([part.transpose(1, 2) for part in _paste(masks, regions, size, threshold)])


def paste_in_chunks(masks: Tensor, regions: Tensor, size: Sequence[int], threshold: float = 0.5) -> Iterator[Tensor]:
    """As :func:`paste_masks`, a part of the masks at a time, each (k, W, H): columns first, as run lengths count."""
    return _paste(masks, regions, size, threshold)


def _paste(masks: Tensor, regions: Tensor, size: Sequence[int], threshold: float) -> Iterator[Tensor]:
    height, width = size
    few = max(1, CHUNK_CELLS // max(1, height * width))
    for logits, part in zip(masks.split(few), regions.split(few), strict=True):
        x1, y1, x2, y2 = part.unbind(dim=1)
        across = _axis_weights(x1, x2, range(width), logits.shape[2])
        along = _axis_weights(y1, y2, range(height), logits.shape[1])
        probabilities = logits.to(torch.float32).sigmoid()
        yield across @ (probabilities.transpose(1, 2) @ along.transpose(1, 2)) >= threshold


def paste_in_regions(
    masks: Tensor, regions: Tensor, size: Sequence[int], threshold: float = 0.5
) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    """As :func:`paste_in_chunks` on the CPU, mask by mask, each around its region alone, which is soonest done there.

    Yields: x and y of the first pixel, and (w, h) bool, columns first.
    """
    height, width = size
    # A pixel more on each side, so that rounding of the region's ends decides nothing here.
    bounded = regions.nan_to_num().clamp(-1, max(size) + 1)
    ends = torch.cat([bounded[:, :2].floor() - 1, bounded[:, 2:].ceil() + 1], dim=1).clamp_(min=0)
    ends = ends.to(torch.int64).minimum(torch.tensor([width, height] * 2))
    probabilities = masks.to(torch.float32).sigmoid().transpose(1, 2)
    for probability, region, (x1, y1, x2, y2) in zip(probabilities, regions, ends.tolist(), strict=True):
        across = _axis_weights(region[0:1], region[2:3], range(x1, max(x1, x2)), masks.shape[2])[0]
        along = _axis_weights(region[1:2], region[3:4], range(y1, max(y1, y2)), masks.shape[1])[0]
        yield x1, y1, (across @ (probability @ along.T) >= threshold).numpy()


def scale_regions(regions: Tensor, resized: Sequence[int], original: Sequence[int]) -> Tensor:
    """Regions (..., 4) of the resized image in pixels of the original; both sizes are height and width."""
    ratio = [original[1] / resized[1], original[0] / resized[0]] * 2
    return regions * torch.tensor(ratio, dtype=torch.float32, device=regions.device)
