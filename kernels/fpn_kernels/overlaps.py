"""Overlaps: the pairs of boxes whose IoU is above a threshold, without a look at all pairs.

If IoU > t, the boxes share more than t of the larger height: intersection <= shared height * smaller width, and
union >= larger area. So their heights differ by less than a factor of t, and the lower box begins within 1 - t of the
upper one's height; likewise along x. Boxes are put into cells by group, octave of height and band of y, and within the
few cells where a partner can be, a window of x is searched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

PAIRS = 1 << 21  # candidate pairs whose IoU is computed at a time: about 100 MB of temporaries
# Taken off the threshold: far above the rounding of the float32 IoU. Where areas leave float32's normal range their
# rounding is unbounded, and nothing but no overlap at all rules a pair out.
SLACK = 1e-4
SMALLEST_AREA = 1e-30
FEW = 4096  # boxes per group up to which groups alone are cells: bands then cost more than they save
# Below this threshold partners' heights differ too much for octaves to tell them apart.
LEAST_BANDED = 0.25
LEAST_OCTAVE = 1.25  # factor of height from octave to octave; 1 / t, but not so little that there are thousands
# The code of a cell is one int64: group (below 2^29), octave (of any float32), band.
BAND_BITS, OCTAVE_BITS = 22, 12


class Windows(NamedTuple):
    """Where partners of ``left`` can be: ``counts`` (W,) boxes from ``begin`` (W,) on in ``order``."""

    left: Tensor
    begin: Tensor
    counts: Tensor
    order: Tensor


class Overlaps:
    """Finds overlapping pairs among some of (K, 4) float32 boxes; boxes of different ``groups`` (K,) never overlap.

    Args: groups: int64, from 0. iou_threshold: IoU must be above it, computed in float32.
    """

    def __init__(self, boxes: Tensor, groups: Tensor, iou_threshold: float) -> None:
        self._boxes, self._threshold = boxes, iou_threshold
        sides = boxes[:, 2:] - boxes[:, :2]
        # Nothing overlaps boxes without area, or with one beyond float32, by an IoU above 0.
        self._proper = (sides > 0).all(dim=1) & areas(boxes).isfinite()
        self._is_tiny = areas(boxes) < SMALLEST_AREA
        self._x1, self._y1 = boxes[:, 0].to(torch.float64), boxes[:, 1].to(torch.float64)
        self._kept_share = max(iou_threshold - SLACK, 0.0)
        self._rest = 1 - self._kept_share
        self._reach = torch.where(self._is_tiny, 1.0, self._rest) * sides[:, 0].to(torch.float64)
        self._groups = groups
        self._is_banded = (
            len(boxes) > FEW * len(groups.unique())
            and self._kept_share >= LEAST_BANDED
            and not bool((self._is_tiny & self._proper).any())
        )
        self._cells = groups
        if self._is_banded:
            self._factor = max(1 / self._kept_share, LEAST_OCTAVE)
            self._height = torch.where(self._proper, sides[:, 1], 1.0).to(torch.float64)
            self._octave = (self._height.log() / math.log(self._factor)).floor()
            self._cells = self._encode(groups, self._octave, self._band(self._y1, self._octave))

    def windows(self, first: Tensor, second: Tensor) -> list[Windows]:
        """Where to look for the pairs between two sets of boxes by index, or within one if both are the same tensor."""
        sides = [(first, second)] if first is second else [(first, second), (second, first)]
        proper = [(left[self._proper[left]], right[self._proper[right]]) for left, right in sides]
        return [self._search(left, right) for left, right in proper if len(left) and len(right)]

    def pairs(self, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs (i, j) in these windows, i < j, some of them twice; ``PAIRS`` candidates at a time."""
        left, begin, counts, order = windows
        for chunk in _chunks(counts, PAIRS):
            number = counts[chunk]
            i = left[chunk].repeat_interleave(number)
            shift = begin[chunk] - (number.cumsum(0) - number)
            j = order[torch.arange(len(i), device=i.device) + shift.repeat_interleave(number)]
            hit = (box_iou_pairs(self._boxes[i], self._boxes[j]) > self._threshold) & (i != j)
            i, j = i[hit], j[hit]
            yield torch.minimum(i, j), torch.maximum(i, j)

    def _search(self, left: Tensor, right: Tensor) -> Windows:
        """Windows of the boxes in ``right`` that begin in x at or behind those in ``left``, within their reach."""
        by_x = self._x1[right].argsort()
        sorted_x1 = self._x1[right][by_x]
        place = torch.empty_like(by_x)  # in the order of x1, made distinct by cell: one search finds a cell's window
        place[by_x] = torch.arange(len(right), device=right.device)
        cells, cell = self._cells[right].unique(return_inverse=True)
        keys, order = (cell * len(right) + place).sort()
        owner, wanted = self._look_up(left)
        known = torch.searchsorted(cells, wanted).clamp(max=len(cells) - 1)
        present = cells[known] == wanted
        owner, base = owner[present], known[present] * len(right)
        start, end = (
            torch.searchsorted(sorted_x1, edge, right=right_side)[owner]
            for edge, right_side in ((self._x1[left], False), (self._x1[left] + self._reach[left], True))
        )
        begin = torch.searchsorted(keys, base + start)
        counts = torch.searchsorted(keys, base + end) - begin
        some = counts > 0
        return Windows(left[owner[some]], begin[some], counts[some], right[order])

    def _look_up(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """The cells where partners of ``left`` can be: (L,) places in ``left`` and (L,) codes."""
        everyone = torch.arange(len(left), device=left.device)
        if not self._is_banded:
            return everyone, self._groups[left]
        owners, codes = [], []
        height, y1, groups = self._height[left], self._y1[left], self._groups[left]
        for step in (-1, 0, 1):
            octave = self._octave[left] + step
            # An upper partner is at most as high as its octave has them, and as the threshold allows beside this box.
            above = self._rest * torch.minimum(self._factor ** (octave + 1), height / self._kept_share)
            first, last = self._band(y1 - above, octave), self._band(y1 + self._rest * height, octave)
            for further in range(1 + int((last - first).max())):
                inside = first + further <= last
                owners.append(everyone[inside])
                codes.append(self._encode(groups[inside], octave[inside], first[inside] + further))
        return torch.cat(owners), torch.cat(codes)

    def _band(self, y: Tensor, octave: Tensor) -> Tensor:
        """(...) float64 number of the band that ``y`` lies in; what is too far away shares the first or last one."""
        size = 2 * self._rest * self._factor ** (octave + 1)
        limit = (1 << (BAND_BITS - 1)) - 1
        return (y / size).floor().clamp(-limit, limit)

    def _encode(self, groups: Tensor, octave: Tensor, band: Tensor) -> Tensor:
        cell = (groups << OCTAVE_BITS) + (octave.to(torch.int64) + (1 << (OCTAVE_BITS - 1)))
        return (cell << BAND_BITS) + band.to(torch.int64)


def box_iou_pairs(a: Tensor, b: Tensor) -> Tensor:
    """IoU of matching rows of two (P, 4) float32 tensors; 0 / 0 is NaN, which exceeds no threshold."""
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    intersection = overlap[:, 0] * overlap[:, 1]
    return intersection / (areas(a) + areas(b) - intersection)


def areas(boxes: Tensor) -> Tensor:
    """(K,) of (K, 4) boxes; negative where one side is."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _chunks(counts: Tensor, limit: int) -> list[slice]:
    """Slices of ``counts`` that sum to about ``limit`` at most, each at least one long."""
    if len(counts) == 0:
        return []
    group = counts.cumsum(0) // limit
    edges = [0, *(1 + (group[1:] != group[:-1]).nonzero()[:, 0]).tolist(), len(counts)]
    return [slice(a, b) for a, b in pairwise(edges)]
