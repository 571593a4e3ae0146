"""Preprocess with NumPy alone: the numbers of :func:`fpn_kernels.preprocess` (Lin et al. 2017, sec. 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fpn_engine.spec import ModelSpec

Plane = NDArray[np.float32]


def preprocess(
    images: Sequence[NDArray[np.uint8]],
    image_sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    spec: ModelSpec,
) -> NDArray[np.float32]:
    """Normalise, resize and pad: x = (uint8 / 255 - mean) / std, bilinear, zeros on the right and bottom.

    Args:
        images: each (H, W, 3) RGB. image_sizes: resized (h, w) of each, at most ``padded_size``.
    Returns: (N, 3, *padded_size) float32.
    """
    batch = np.zeros((len(images), 3, *padded_size), dtype=np.float32)
    shades = np.arange(256, dtype=np.float32) / np.float32(255)
    for out, image, (h, w) in zip(batch, images, image_sizes, strict=True):
        upright, across = _Taps(image.shape[0], h), _Taps(image.shape[1], w)
        for channel, (mean, std) in enumerate(zip(spec.image_mean, spec.image_std, strict=True)):
            plane = image[:, :, 2 - channel if spec.channel_order == "bgr" else channel]
            # Only 256 values occur, so they are normalised, not the pixels; of a large picture not all are read.
            normalised = ((shades - np.float32(mean)) / np.float32(std))[plane[np.ix_(upright.read, across.read)]]
            out[channel, :h, :w] = upright.mix(across.mix(normalised.T).T)
    return batch


class _Taps:
    """Where bilinear resizing from ``size`` to ``resized`` cells reads: at (i + 0.5) size / resized - 0.5, clamped.

    Attributes:
        read: the cells that are read, ascending.
    """

    def __init__(self, size: int, resized: int) -> None:
        half = np.float32(0.5)  # every step rounds to float32, as in PyTorch
        scale = np.float32(size) / np.float32(resized)
        source = ((np.arange(resized, dtype=np.float32) + half) * scale - half).clip(0, size - 1)
        low = np.floor(source).astype(np.int64)
        high = np.minimum(low + 1, size - 1)
        self._high_weight = (source - low.astype(np.float32))[:, None]
        self._low_weight = np.float32(1) - self._high_weight
        self.read, place = np.unique(np.concatenate([low, high]), return_inverse=True)
        self._low, self._high = place[:resized], place[resized:]

    def mix(self, rows: Plane) -> Plane:
        """(len(read), ...) rows to (resized, ...)."""
        mixed: Plane = rows[self._low] * self._low_weight + rows[self._high] * self._high_weight
        return mixed
