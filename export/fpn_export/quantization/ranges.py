"""Ranges of activations: from a histogram of magnitudes to the largest one that 8 bits stand for.

Beyond the range numbers saturate, within it they are rounded: a wide range rounds coarsely, a narrow one cuts off.
"max" cuts nothing, "percentile" a fixed share, "mse" weighs both by squared error, "entropy" by the divergence of the
two distributions (Migacz 2017, 8-bit inference with TensorRT).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpn_export.quantization.eight_bits import INT8, find_scale, to_steps

BINS = 4096  # 2048 to 4096 of them in use
LEVELS = 128  # magnitudes of int8, 0 included
PERCENTILE = 99.99
CANDIDATES = 128  # ranges that "mse" and "entropy" try
NARROWEST = 1 / 16  # of the largest magnitude: the narrowest that they try

Counts = NDArray[np.float64]


class Histogram:
    """Magnitudes of one value over all images, in bins of equal width.

    The first image sets the width; a larger magnitude doubles it, by adding neighbours, until it fits. No image is kept
    and none is read twice.

    Attributes: largest: exactly. count: how many numbers there were.
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._limit = 0.0  # upper edge of the last bin
        self.largest = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Count float32 ``values`` of any shape. Raises ValueError for NaN or infinity."""
        flat = values.detach().reshape(-1).abs()
        largest = float(flat.max()) if flat.numel() else 0.0
        if not np.isfinite(largest):
            raise ValueError("NaN or infinity")
        self.count += flat.numel()
        self.largest = max(self.largest, largest)
        if largest == 0.0:  # in the first bin, whatever its width
            self._counts[0] += flat.numel()
            return
        if self._limit == 0.0:
            self._limit = largest
        while self._limit < largest:
            self._counts = torch.cat([self._counts.view(-1, 2).sum(dim=1), self._counts.new_zeros(BINS // 2)])
            self._limit *= 2
        self._counts += torch.histc(flat, BINS, min=0.0, max=self._limit).double()

    @property
    def counts(self) -> Counts:
        """(b,) how many magnitudes are in each bin, up to the last that holds one."""
        counts = self._counts.numpy()
        used = np.flatnonzero(counts)
        return counts[: used[-1] + 1] if len(used) else counts[:1]

    @property
    def width(self) -> float:
        """Of a bin."""
        return self._limit / BINS


def find_max(histogram: Histogram, precision: str) -> float:
    """The largest magnitude."""
    return histogram.largest


def find_percentile(histogram: Histogram, precision: str) -> float:
    """The magnitude that ``PERCENTILE`` of 100 numbers do not exceed, up to the width of a bin."""
    counts = histogram.counts
    index = int(np.searchsorted(counts.cumsum(), counts.sum() * PERCENTILE / 100))
    return min(histogram.largest, (min(index, len(counts) - 1) + 1) * histogram.width)


def find_mse(histogram: Histogram, precision: str) -> float:
    """The range of least squared error, each bin at its middle."""
    counts = histogram.counts
    middles = (np.arange(len(counts)) + 0.5) * histogram.width
    tried = histogram.largest * np.linspace(NARROWEST, 1, CANDIDATES)
    errors = []
    for limit in tried:
        scale = find_scale(limit, precision)
        rounded = to_steps(middles, scale, precision).astype(np.float64) * scale
        errors.append(float((counts * (middles - rounded) ** 2).sum()))
    return float(tried[int(np.argmin(errors))])


def find_entropy(histogram: Histogram, precision: str) -> float:
    """The range of least divergence between the numbers cut off there and the same in ``LEVELS`` levels."""
    if precision != INT8:
        raise ValueError(f"entropy is of equal steps, which {precision} has not")
    counts = histogram.counts.copy()
    # As Migacz does: zeros are exact in any range, and behind a ReLU they would outweigh all else.
    counts[0] = counts[1] if len(counts) > 1 else counts[0]
    if len(counts) <= LEVELS:
        return histogram.largest
    first = max(LEVELS, int(len(counts) * NARROWEST))
    tried = np.unique(np.linspace(first, len(counts), CANDIDATES).astype(int))
    divergences = [_diverge(counts, int(bins)) for bins in tried]
    return min(histogram.largest, float(tried[int(np.argmin(divergences))]) * histogram.width)


def _diverge(counts: Counts, bins: int) -> float:
    """KL(P || Q) of the first ``bins``: P with all beyond them in the last, Q their means over each level."""
    kept = counts[:bins]
    cut = kept.copy()
    cut[-1] += counts[bins:].sum()
    level = np.arange(bins) * LEVELS // bins
    there = kept > 0
    totals = np.bincount(level, weights=kept, minlength=LEVELS)
    members = np.bincount(level, weights=there, minlength=LEVELS)
    spread = np.where(there, (totals / np.maximum(members, 1))[level], 0.0)
    p, q = cut / cut.sum(), spread / max(spread.sum(), 1e-30)
    seen = (p > 0) & (q > 0)
    missed = p[(p > 0) & (q == 0)].sum()  # of a last bin that is empty but for what was cut off
    return float((p[seen] * np.log(p[seen] / q[seen])).sum() + missed * np.log(1 / 1e-9))


RANGES: dict[str, Callable[[Histogram, str], float]] = {
    "max": find_max,
    "percentile": find_percentile,
    "mse": find_mse,
    "entropy": find_entropy,
}
