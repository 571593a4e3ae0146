"""Paste: masks resized into their regions of the image and cut at a probability (He et al. 2017, sec. 3).

A mask is resized bilinearly, half-pixel centres, edges repeated; outside of its region there is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK_CELLS = 1 << 25  # pixels that are pasted at a time: 128 MB of float32


def _axis_weights(low: Tensor, high: Tensor, length: int, cells: int) -> Tensor:
    """(K, length, cells) float32: how much each of a mask's cells is worth at each pixel along one axis."""
    pixel = torch.arange(length, dtype=torch.float32, device=low.device) + 0.5
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
        across = _axis_weights(x1, x2, width, logits.shape[2])
        along = _axis_weights(y1, y2, height, logits.shape[1])
        probabilities = logits.to(torch.float32).sigmoid()
        yield across @ (probabilities.transpose(1, 2) @ along.transpose(1, 2)) >= threshold


def scale_regions(regions: Tensor, resized: Sequence[int], original: Sequence[int]) -> Tensor:
    """Regions (..., 4) of the resized image in pixels of the original; both sizes are height and width."""
    ratio = [original[1] / resized[1], original[0] / resized[0]] * 2
    return regions * torch.tensor(ratio, dtype=torch.float32, device=regions.device)
