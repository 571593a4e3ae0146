"""Ten shapes as signed distance functions: which pixels belong to a shape, smoothly, with nothing but arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]
# Points (x, y) of a grid to the distance from the outline, negative inside; the shape fits the circle of radius 1.
Shape = Callable[[Field, Field], Field]


def disc(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 1


def ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - 0.74) - 0.26


def crescent(x: Field, y: Field) -> Field:
    return np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y))


def half_disc(x: Field, y: Field) -> Field:
    return np.maximum(np.hypot(x, y + 0.45) - 0.89, -(y + 0.45))


def square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - math.sqrt(0.5)


def bar(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.3)


def cross(x: Field, y: Field) -> Field:
    return np.minimum(np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.3), np.maximum(np.abs(x) - 0.3, np.abs(y) - 0.95))


def _polygon(points: list[tuple[float, float]]) -> Shape:
    """Convex polygon, corners counter-clockwise: the largest of the distances from its sides."""
    sides = list(pairwise([*points, points[0]]))

    def shape(x: Field, y: Field) -> Field:
        distances = []
        for (ax, ay), (bx, by) in sides:
            length = math.hypot(bx - ax, by - ay)
            distances.append(((x - ax) * (by - ay) - (y - ay) * (bx - ax)) / length)
        return np.maximum.reduce(distances)

    return shape


def _corners(count: int, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * k / count for k in range(count)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def _star(x: Field, y: Field) -> Field:
    """Five points: the union of five triangles, each from one tip to the two inner corners beside the opposite side."""
    angle = np.arctan2(y, x)
    sector = 2 * math.pi / 5
    folded = np.abs((angle + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(folded), radius * np.sin(folded)
    inner = 0.42
    bx, by = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    length = math.hypot(bx - 1, by)
    return ((px - 1) * by - py * (bx - 1)) / length


triangle = _polygon(_corners(3))
hexagon = _polygon(_corners(6))
star: Shape = _star

SHAPES: dict[str, Shape] = {
    "disc": disc,
    "ring": ring,
    "crescent": crescent,
    "half-disc": half_disc,
    "square": square,
    "bar": bar,
    "cross": cross,
    "triangle": triangle,
    "hexagon": hexagon,
    "star": star,
}
