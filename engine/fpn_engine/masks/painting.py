"""Mask proposals painted on a photograph: each in a colour of its own, the best on top."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fpn_engine.detections import Detections
from fpn_engine.drawing import category_color
from fpn_engine.masks.run_lengths import Masks, decode_masks

MOST = 100  # best masks that are looked at
SAME = 0.5  # IoU from which on two masks are of one object, of which the better is painted
OPACITY = 0.5


def paint_masks(image: NDArray[np.uint8], detections: Detections) -> Image.Image:
    """Paint masks on a copy of ``image``, with a line around each.

    There is no NMS between proposals; of those that overlap by half or more the best alone is painted.

    Args: image: (H, W, 3) uint8 RGB, that ``detections``, which have masks, belong to.
    Raises: ValueError for an image of another size.
    """
    if image.shape != (*detections.image_size, 3):
        raise ValueError(f"image must be {(*detections.image_size, 3)}, not {image.shape}")
    painted = image.astype(np.float32)
    chosen = choose_apart(decode_masks((detections.run_lengths or ())[:MOST], detections.image_size))
    for number, mask in reversed(list(enumerate(chosen))):
        color = np.array(category_color(number), np.float32)
        painted[mask] += OPACITY * (color - painted[mask])
        painted[_find_edge(mask)] = color
    return Image.fromarray(painted.round().astype(np.uint8))


def choose_apart(masks: Masks) -> list[Masks]:
    """Of masks (K, H, W), best first, those that overlap no better one by ``SAME`` or more; empty ones are left out."""
    chosen: list[Masks] = []
    for mask in masks:
        unions = [np.count_nonzero(mask | other) for other in chosen]
        shared = [np.count_nonzero(mask & other) for other in chosen]
        if mask.any() and all(s < SAME * u for s, u in zip(shared, unions, strict=True)):
            chosen.append(mask)
    return chosen


def _find_edge(mask: Masks) -> Masks:
    """Pixels of a mask with a neighbour to a side that is not of it; the picture's border is no edge."""
    padded = np.pad(mask, 1, mode="edge")
    within: Masks = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~within
