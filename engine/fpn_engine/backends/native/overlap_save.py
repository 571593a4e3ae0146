"""Scores of an MLP that slides over levels, by the overlap-save method: large windows as products of spectra.

A k x k convolution of C channels costs k^2 C products for each output. On tiles of T x T cells, of which the
T - k + 1 squared in the middle come out right, it costs one complex product per channel and frequency: about 2 C
and 3 C products for 5x5 and 7x7 windows. That is worth most for segmentation proposals (Lin et al. 2017, sec. 6), whose
scores need 512 hidden channels everywhere. Those of a tile become its scores at once; no map of them is stored.

- Across, frequencies are half-integer. Then T / 2 columns of T say all of a real tile, and none is a special case; the
  tile wraps around with its sign turned, which touches the margin alone.
- A complex product is three real ones (Gauss): a (c + di), b (d - c) and so on, of which one serves twice. Sums before
  them are part of the transform into frequencies, sums behind them of the transform back.
- Transforms are products with small matrices, which for sides this small takes a third of the time of FFT libraries.
- The products of all frequencies are one grouped 1x1 convolution of oneDNN on rows of tiles.
- What is transformed are deviations from each channel's mean, the zeros around a level among them; what the mean itself
  makes of a window is the same everywhere. Most of a trained pyramid's features is their mean, and most of the rounding
  with it.

Rounding is less than a direct convolution's, whose sums are longer. In bfloat16 all of it takes half the bytes, and on
processors that multiply bfloat16 less time, for scores that are right to a few hundredths of their spread: enough to
choose candidates by, see :mod:`fpn_engine.masks.screening`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Measured on two Zen 4 cores, levels of an image of 800x1216, 128 channels: tiles at a time and bytes of a cell's
# hidden channels at a time that keep what lies between two steps in the last cache.
TILES, HIDDEN_BYTES = 112, 256
MAX_SPECTRUM_BYTES = 1 << 29  # of one layer; wider layers than any model of the paper are convolved directly
_GEOMETRY = ([0, 0], [1, 1], [1, 1])
Matrix = NDArray[np.float64]


def tile_side(kernel: int) -> int:
    """Cells of a tile: 24 for windows up to 5, 22 for 7; between 16 and 28 times differ little."""
    return 24 if kernel <= 5 else kernel + 15


def spectrum_bytes(channels: int, hidden: int, kernel: int, dtype: torch.dtype = torch.float32) -> int:
    """Memory that a layer's weights take as spectra."""
    return dtype.itemsize * 3 * tile_side(kernel) ** 2 // 2 * channels * hidden


class _Strip(NamedTuple):
    """Neighbouring tiles of one row: of image ``image`` and level ``level``, ``tiles`` of them from a column on."""

    level: int
    image: int
    row: int
    column: int
    tiles: int


class _Buffers(NamedTuple):
    """What lies between the steps, for up to as many tiles as there are in a part; memory is asked for once a call."""

    tiles: Tensor
    rows: Tensor
    spectra: Tensor
    columns: Tensor
    hidden: Tensor

    @classmethod
    def make(cls, like: Tensor, count: int, side: int, valid: int, hidden: int) -> Self:
        channels = like.shape[3]
        return cls(
            like.new_empty(count, side, side, channels),
            like.new_empty(count, side, side * channels),
            like.new_empty(count, side // 2, 3 * side, channels),
            like.new_empty(count, side * valid * hidden),
            like.new_empty(count, valid * valid * hidden),
        )


class OverlapSave:
    """score(relu(conv(x))) at every cell of levels, zeros around them; float32 (N, H, W) for each (N, H, W, C).

    Args:
        weight: (O, k, k, C). bias: (O,) or None. score: (O,). score_bias: (1,) or None. All float32, on the CPU.
        dtype: of what is computed, float32 or bfloat16; levels and scores are float32.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        score: Tensor,
        score_bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        hidden, self._kernel, _, self._channels = weight.shape
        self._dtype, self._hidden = dtype, HIDDEN_BYTES // dtype.itemsize
        self._side = tile_side(self._kernel)
        self._valid = self._side - self._kernel + 1
        matrices = _transforms(self._side, self._valid)
        self._across, self._down, self._up, self._back = (torch.from_numpy(m).to(dtype) for m in matrices)
        self._groups = 3 * self._side**2 // 2  # frequencies times the three real products of each
        self._bias = score.new_zeros(hidden) if bias is None else bias
        self._of_mean = weight.sum(dim=(1, 2)).t()  # (C, O)
        self._score_weight, self._score_bias = score, 0.0 if score_bias is None else float(score_bias)
        by_slice = zip(weight.split(self._hidden), score.to(dtype).split(self._hidden), strict=True)
        self._slices = [(self._pack(w), s) for w, s in by_slice]

    def __call__(self, levels: Sequence[Tensor]) -> list[Tensor]:
        means = [level.mean(dim=(1, 2)) for level in levels]
        padded = [self._pad(level, mean) for level, mean in zip(levels, means, strict=True)]
        biases = [torch.addmm(self._bias, mean, self._of_mean) for mean in means]  # (N, O) each
        v, side = self._valid, self._side
        # (N, rows, columns, C, side, side): tiles that overlap, without a copy
        tiles = [level.unfold(1, side, v).unfold(2, side, v) for level in padded]
        scores = [
            torch.empty(len(level), t.shape[1] * v, t.shape[2] * v) for level, t in zip(padded, tiles, strict=True)
        ]
        chunks = list(_chunks([t.shape[:3] for t in tiles]))
        most = max(sum(s.tiles for s in strips) for strips in chunks)
        work = _Buffers.make(padded[0], most, side, v, self._hidden)
        for strips in chunks:
            start = 0
            for s in strips:
                part = tiles[s.level][s.image, s.row, s.column : s.column + s.tiles]
                work.tiles[start : start + s.tiles].copy_(part.permute(0, 3, 2, 1))
                start += s.tiles
            bias = torch.cat([biases[s.level][s.image].expand(s.tiles, -1) for s in strips])
            found, start = self._score(work, bias), 0
            for s in strips:
                rows, columns = slice(s.row * v, (s.row + 1) * v), slice(s.column * v, (s.column + s.tiles) * v)
                part = found[start : start + s.tiles].permute(2, 0, 1).reshape(v, -1)
                scores[s.level][s.image, rows, columns] = part
                start += s.tiles
        return [score[:, : level.shape[1], : level.shape[2]] for score, level in zip(scores, levels, strict=True)]

    def _pad(self, level: Tensor, mean: Tensor) -> Tensor:
        """A level less its means, (N, C), and zeros less them around it, to the right and below so many that tiles
        come out even.
        """
        margin, mean = self._kernel // 2, mean[:, None, None]
        n, height, width, c = level.shape
        down, right = (-side % self._valid + 2 * margin for side in (height, width))
        padded = torch.empty(n, height + down, width + right, c, dtype=self._dtype).copy_(-mean)
        torch.sub(level, mean, out=padded[:, margin : margin + height, margin : margin + width])
        return padded

    def _score(self, work: _Buffers, bias: Tensor) -> Tensor:
        """The first tiles, (t, x, y, C), to the scores of their middle, (t, x, y); ``bias`` is (t, O)."""
        t, side, v, c = len(bias), self._side, self._valid, self._channels
        half = side // 2
        tiles, rows, spectra, columns, hidden = (buffer[:t] for buffer in work)
        torch.bmm(self._across.expand(t, side, side), tiles.view(t, side, side * c), out=rows)
        down = self._down.expand(t * half, 3 * side, 2 * side)
        torch.bmm(down, rows.view(t * half, 2 * side, c), out=spectra.view(t * half, 3 * side, c))
        x = spectra.view(1, t, 1, self._groups * c).permute(0, 3, 1, 2)
        # relu(h + b) = max(h, -b) + b, so that what b adds to the score is one number; rounded, b is so in both places.
        least = (-bias).to(self._dtype)[:, None]
        total = (self._score_bias - torch.mv(least[:, 0].float(), self._score_weight)).repeat_interleave(v * v)
        for (weight, score), floor in zip(self._slices, least.split(self._hidden, dim=2), strict=True):
            n = len(score)
            y = torch.ops.mkldnn._convolution_pointwise(x, weight, None, *_GEOMETRY, self._groups, "none", [], "")
            products = y.permute(0, 2, 3, 1).view(t * half, 3 * side, n)
            middle = columns.flatten()[: t * half * 2 * v * n].view(t * half, 2 * v, n)
            torch.bmm(self._up.expand(t * half, 2 * v, 3 * side), products, out=middle)
            last = hidden.flatten()[: t * v * v * n].view(t, v, v * n)
            torch.bmm(self._back.expand(t, v, side), middle.view(t, side, v * n), out=last)
            relu = last.view(t, v * v, n)
            total.add_(torch.mv(torch.maximum(relu, floor, out=relu).view(-1, n), score))
        return total.view(t, v, v)

    def _pack(self, weight: Tensor) -> Tensor:
        """(O, k, k, C) to its spectra, as oneDNN wants a grouped convolution's weight laid out."""
        side, k = self._side, self._kernel
        out, _, _, c = weight.shape
        # A convolution in the sense of networks is a correlation: the window turned around.
        turned = weight.double().flip(1, 2).permute(2, 1, 0, 3).reshape(k, k * out * c)
        n = np.arange(k)
        x = torch.from_numpy(np.exp(-2j * np.pi * np.outer(np.arange(side // 2) + 0.5, n) / side))
        y = torch.from_numpy(np.exp(-2j * np.pi * np.outer(np.arange(side), n) / side))
        found = (y @ (x @ turned.to(x.dtype)).view(side // 2, k, out * c)).view(side // 2, side, out, c)
        # Of (a + bi)(w + vi) with s = a + b: s w - b (w + v) is the real part, s w + a (v - w) the imaginary one.
        w, v = found.real, found.imag
        parts = torch.stack([w, v - w, w + v], dim=2).to(self._dtype).view(self._groups * out, c, 1, 1)
        shape = [1, self._groups * c, TILES, 1]
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(parts, *_GEOMETRY, self._groups, shape)
        return packed


def _transforms(side: int, valid: int) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """The steps into frequencies and back, as matrices that multiply from the left.

    (x) to (frequency across, part); (part, y) to (frequency down, product); (frequency down, product) to (part, y);
    (frequency across, part) to (x). Parts are real and imaginary; coming back, x and y are those of the middle.
    """
    n, middle = np.arange(side), np.arange(side - valid, side)
    half = np.arange(side // 2) + 0.5

    def turns(a: NDArray[Any], b: NDArray[Any]) -> tuple[Matrix, Matrix]:
        angle = 2 * np.pi * np.outer(a, b) / side
        return np.cos(angle), np.sin(angle)

    cos, sin = turns(half, n)
    across = np.stack([cos, -sin], axis=1).reshape(side, side)
    cos, sin = turns(n, n)
    real, imaginary = np.hstack([cos, sin]), np.hstack([-sin, cos])
    down = np.stack([real + imaginary, real, imaginary], axis=1).reshape(3 * side, 2 * side)
    cos, sin = (part / side for part in turns(middle, n))
    up = np.stack([[cos - sin, -sin, -cos], [sin + cos, cos, -sin]])  # (part, product, y, frequency)
    up = up.transpose(0, 2, 3, 1).reshape(2 * valid, 3 * side)
    cos, sin = (2 * part / side for part in turns(middle, half))
    back = np.stack([cos, -sin], axis=2).reshape(valid, side)
    return across, down, up, back


def _chunks(grids: Sequence[Sequence[int]]) -> Iterator[list[_Strip]]:
    """All tiles of levels that have ``grids`` (N, rows, columns) of them, in parts of nearly one size."""
    total = sum(math.prod(grid) for grid in grids)
    size = math.ceil(total / math.ceil(total / TILES))
    strips: list[_Strip] = []
    room = size
    for level, (images, rows, columns) in enumerate(grids):
        for image in range(images):
            for row in range(rows):
                column = 0
                while column < columns:
                    count = min(room, columns - column)
                    strips.append(_Strip(level, image, row, column, count))
                    column, room = column + count, room - count
                    if room == 0:
                        yield strips
                        strips, room = [], size
    if strips:
        yield strips
