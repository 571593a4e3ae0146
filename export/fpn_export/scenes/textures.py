"""Textures: procedural colour fields for objects, background and clutter."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import RandomState

from fpn_export.scenes.shapes import Field

Colors = Field  # (H, W, 3), in 0..1


def make_texture(random: RandomState, x: Field, y: Field, coarseness: float) -> Colors:
    """An (H, W, 3) float32 field of colours in 0..1 at pixel coordinates ``x``, ``y``, each (H, W).

    Args:
        random: where all choices come from; its stream is frozen across NumPy versions.
        coarseness: pixels per period, from about 3 up.
    """
    kind = _KINDS[random.randint(len(_KINDS))]
    blend = kind(random, x, y, coarseness)[..., None]
    first, second = random.uniform(0, 1, 3), random.uniform(0, 1, 3)
    grain = random.normal(0, 0.04, (*x.shape, 1))
    return np.clip(first * (1 - blend) + second * blend + grain, 0, 1).astype(np.float32)


def value_noise(random: RandomState, height: int, width: int, cell: float) -> Field:
    """Smooth (height, width) noise in 0..1, one random value every ``cell`` pixels, bilinear between them."""
    rows, columns = int(height / cell) + 2, int(width / cell) + 2
    grid = random.uniform(0, 1, (rows, columns))
    y, x = np.arange(height) / cell, np.arange(width) / cell
    y0, x0 = y.astype(int), x.astype(int)
    fy, fx = (y - y0)[:, None], (x - x0)[None]
    above = grid[y0][:, x0] * (1 - fx) + grid[y0][:, x0 + 1] * fx
    below = grid[y0 + 1][:, x0] * (1 - fx) + grid[y0 + 1][:, x0 + 1] * fx
    return (above * (1 - fy) + below * fy).astype(np.float32)


def _turned(random: RandomState, x: Field, y: Field) -> Field:
    angle = random.uniform(0, math.pi)
    return math.cos(angle) * x + math.sin(angle) * y


def _stripes(random: RandomState, x: Field, y: Field, coarseness: float) -> Colors:
    return 0.5 + 0.5 * np.sin(2 * math.pi / coarseness * _turned(random, x, y))


def _checks(random: RandomState, x: Field, y: Field, coarseness: float) -> Colors:
    angle = random.uniform(0, math.pi)
    u = math.cos(angle) * x + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x
    return (np.floor(u / coarseness) + np.floor(v / coarseness)) % 2


def _gradient(random: RandomState, x: Field, y: Field, coarseness: float) -> Colors:
    ramp = _turned(random, x, y)
    low, high = ramp.min(), ramp.max()
    return (ramp - low) / max(float(high - low), 1e-6)


def _clouds(random: RandomState, x: Field, y: Field, coarseness: float) -> Colors:
    height, width = x.shape
    return 0.6 * value_noise(random, height, width, 2 * coarseness) + 0.4 * value_noise(
        random, height, width, coarseness
    )


def _plain(random: RandomState, x: Field, y: Field, coarseness: float) -> Colors:
    return np.zeros_like(x)


_KINDS = (_stripes, _checks, _gradient, _clouds, _plain)
