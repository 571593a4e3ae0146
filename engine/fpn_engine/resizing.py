"""The size rule: how large an image enters the network (Lin et al. 2017, sec. 5; torchvision's rounding)."""

from __future__ import annotations

import math


def resized_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width after scaling by min(min_size / short side, max_size / long side).

    Computed in float64 and floored, as torchvision's eager path does (its traced path takes float32 and gives other
    sizes for some shapes); a side never falls below one pixel.
    """
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def padded_size(resized: tuple[int, int], divisor: int = 32) -> tuple[int, int]:
    """The next multiples of ``divisor`` on the right and bottom."""
    return (resized[0] + divisor - 1) // divisor * divisor, (resized[1] + divisor - 1) // divisor * divisor
