"""Boxes for the tests, random and awkward, features to pool them from, and greedy NMS as plain as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

REAL_SIZE = (800, 1216)
# P2..P6 of an 800 x 1216 image: every level halves, rounding up.
REAL_LEVELS = ((200, 304), (100, 152), (50, 76), (25, 38), (13, 19))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(count: int, size: tuple[float, float] = REAL_SIZE, *, largest: float = 400, seed: int = 0) -> Tensor:
    """(count, 4) proper boxes, centred inside the image, log-uniform in side from 4 pixels to ``largest``."""
    rand = torch.rand(4, count, generator=seeded(seed))
    h, w = (4 * (largest / 4) ** r for r in rand[:2])
    y, x = rand[2] * size[0], rand[3] * size[1]
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)


def clustered_boxes(count: int, objects: int, *, seed: int = 0) -> Tensor:
    """(count, 4) boxes that crowd around a few objects, as a detector's do before NMS."""
    centre = random_boxes(objects, seed=seed)[torch.randint(objects, (count,), generator=seeded(seed + 1))]
    sides = (centre[:, 2:] - centre[:, :2]).repeat(1, 2)
    return centre + 0.1 * sides * torch.randn(count, 4, generator=seeded(seed + 2))


def make_rois(per_image: int, n: int = 2, size: tuple[float, float] = REAL_SIZE, *, largest: float = 400) -> Tensor:
    """(n * per_image, 5) RoIs, image by image; some reach over the border."""
    boxes = random_boxes(n * per_image, size, largest=largest)
    return torch.cat([torch.arange(n).repeat_interleave(per_image)[:, None], boxes], dim=1)


def make_pyramid(
    n: int = 2, c: int = 4, levels: Sequence[tuple[int, int]] = REAL_LEVELS[:4], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Features of each level, (n, c, H, W), all different."""
    return [torch.randn(n, c, h, w, generator=seeded(h)).to(dtype) for h, w in levels]


# Few distinct values, so that ties, identical boxes, zero areas and inverted boxes are the rule, and IoUs are simple
# fractions that meet simple thresholds exactly.
COORDINATES = st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, -5.0, 1e-20, 1e30, -1e30])
SPOILT = st.sampled_from([math.nan, math.inf, -math.inf])
SCORES = st.sampled_from([0.0, -0.0, 0.25, 0.5, 0.5, 0.5, 1.0, -1.0, math.nan, math.inf, -math.inf])
GROUPS = st.sampled_from([0, 0, 0, 1, -7, 10**9, 2**62])
THRESHOLDS = st.sampled_from([0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7, 0.75, 1.0])


@st.composite
def awkward_boxes(draw: st.DrawFn, most: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """(K, 4) boxes, (K,) scores and (K,) groups with everything that can be wrong with them."""
    corner = st.one_of(*[COORDINATES] * 19, SPOILT)
    rows = draw(st.lists(st.tuples(corner, corner, corner, corner, SCORES, GROUPS), max_size=most))
    boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([row[4] for row in rows], dtype=torch.float32)
    return boxes, scores, torch.tensor([row[5] for row in rows], dtype=torch.int64)


def greedy_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, max_out: int) -> list[int]:
    """Kept indices, one box after another, in float32."""
    rows, values, names = boxes.numpy(), scores.tolist(), groups.tolist()
    present = [i for i, v in enumerate(values) if v > -math.inf and np.isfinite(rows[i]).all()]
    kept: list[int] = []
    with np.errstate(all="ignore"):
        for i in sorted(present, key=lambda i: (-values[i], i)):
            rivals = [j for j in kept if names[j] == names[i]]
            if all(not iou(rows[j], rows[i]) > np.float32(threshold) for j in rivals):
                kept.append(i)
    return kept[:max_out]


def iou(a: np.ndarray, b: np.ndarray) -> np.float32:
    zero = np.float32(0)
    width = max(zero, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(zero, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
