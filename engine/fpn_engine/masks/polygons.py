"""Polygons: outlines of binary masks along the edges of their pixels, exactly; with numpy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def trace_polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """The outer outlines of a mask as COCO polygons, [x1, y1, x2, y2, ...] in pixels, the largest first.

    Corners lie at the corners of pixels; straight edges have no points between. Pixels that touch at a corner alone are
    apart. COCO's polygons know no holes: what they enclose is filled; run lengths keep them.

    Args: mask: (H, W) bool.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    # Around each corner of pixels: top left, top right, bottom left, bottom right.
    tl, tr, bl, br = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    count = tl + tr + bl + br
    crossing = (count == 2) & (tl == br)  # two pixels that touch here alone: two corners in one place
    corner = (count == 1) | (count == 3) | crossing
    y, x = np.nonzero(corner)
    twice = crossing[y, x]
    falling = tl[y, x] == 1  # of a crossing: the pixels are top left and bottom right
    y, x, falling, twice = (np.repeat(values, 1 + twice) for values in (y, x, falling, twice))
    number = np.arange(len(y))
    second = np.concatenate([[False], (y[1:] == y[:-1]) & (x[1:] == x[:-1])])[: len(y)]
    # Along a row of corners each odd one is joined to the next, and so along a column: the sides of the outlines.
    # The first of a crossing's two ends the side from the left, the second begins the one to the right; it is the
    # first that meets the side from above where the pixels fall, and the second where they rise.
    across = np.lexsort((second, x, y))
    lower = np.where(twice & ~falling, ~second, second)
    along = np.lexsort((lower, y, x))
    horizontal, vertical = np.empty_like(number), np.empty_like(number)
    for order, partner in ((across, horizontal), (along, vertical)):
        partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return _walk(x.tolist(), y.tolist(), horizontal.tolist(), vertical.tolist(), (br[y, x] == 1).tolist())


def _walk(
    x: list[int], y: list[int], horizontal: list[int], vertical: list[int], is_outer: list[bool]
) -> list[list[float]]:
    """Loops of corners by their partners, by area; those around the outside alone.

    The first corner of a loop is its topmost and of these the leftmost; a pixel of the mask to its lower right makes
    the loop an outside.
    """
    seen = [False] * len(x)
    outlines = []
    for start in range(len(x)):
        if seen[start]:
            continue
        loop, at = [], start
        while not seen[at]:
            across = horizontal[at]
            seen[at] = seen[across] = True
            loop += [at, across]
            at = vertical[across]
        if is_outer[start]:
            area = sum(x[a] * y[b] - x[b] * y[a] for a, b in zip(loop, loop[1:] + loop[:1], strict=True)) / 2
            outlines.append((abs(area), [float(value) for i in loop for value in (x[i], y[i])]))
    return [points for _, points in sorted(outlines, key=lambda outline: -outline[0])]
