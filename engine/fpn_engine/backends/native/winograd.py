"""3x3 convolution on a CPU by Winograd's F(4x4, 3x3): a quarter of the products (Lavin and Gray 2016, sec. 4).

A tile of 4x4 results needs 6x6 cells of the input d and is A^T [(G g G^T) * (B^T d B)] A. Both transforms are linear
in the tile, so that each is one product with a 36x36 or 16x36 matrix, the Kronecker square of B^T or A^T. The products
over channels are 36 matrix products, for which a grouped 1x1 convolution of oneDNN is a third faster than torch's bmm.
Strips of some tiles each keep all of it in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from fpn_engine.backends.native.ops import UNIT, Conv
from fpn_engine.backends.native.shapes import Shape

RESULTS, CELLS = 4, 6  # sides of a tile, and of what it reads
# Points 0, 1, -1, 2, -2 and infinity, as Lavin and Gray have them; in float32 the error is some five times that of the
# plain sum.
INPUT = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
WINDOW = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
OUTPUT = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)
FEWEST_CHANNELS = 128  # on either side; of fewer the transforms cost what the products save
FEWEST_TILES = 64  # of an image: fewer rows do not fill a matrix product
# Tiles in a strip, at most where a row has fewer: so few that the caches have them, and so many that reading a large
# weight for each strip does not count.
STRIP, SHORT_STRIP, LARGE_WEIGHT = 256, 96, 1 << 15
# What weights are laid out for: oneDNN has one layout for 64 to 256 rows, and lays out anew where another is due.
PACKED_FOR = 128
GEOMETRY = ([0, 0], [1, 1], [1, 1], CELLS * CELLS)


class WinogradWeights(Mapping[str, Tensor]):
    """Transformed weights, each made when it is first asked for and shared by all operations that have it."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._transformed: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._transformed:
            self._transformed[name] = transform_weight(self._weights[name])
        return self._transformed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def transform_weight(weight: Tensor) -> Tensor:
    """(O, 3, 3, C) to (36 O, C, 1, 1) as oneDNN wants it laid out, in float64 on the way."""
    window = torch.tensor(WINDOW, dtype=torch.float64)
    out_channels, _, _, channels = weight.shape
    transformed = torch.einsum("ai,bj,oijc->aboc", window, window, weight.double())
    flat = transformed.reshape(GEOMETRY[3] * out_channels, channels, 1, 1).to(weight.dtype)
    shape = [1, GEOMETRY[3] * channels, PACKED_FOR, 1]
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        flat.contiguous(memory_format=torch.channels_last), *GEOMETRY, shape
    )
    return packed


def suits(op: Conv, weight: Tensor) -> bool:
    """Whether ``op`` with ``weight`` (O, kH, kW, C) can be computed so, with a gain on maps that are not tiny."""
    return (
        tuple(weight.shape[1:3]) == (3, 3)
        and (op.stride, op.dilation, op.groups, op.upsample) == (UNIT, UNIT, 1, UNIT)
        and op.padding == (1, 1, 1, 1)
        and op.dtype is None
        and weight.dtype == torch.float32
        and min(weight.shape[0], weight.shape[3]) >= FEWEST_CHANNELS
    )


def pays(shape: Shape) -> bool:
    """Whether a map (N, H, W, C) is large enough for it, and no wider than a strip."""
    down, across = _count_tiles(shape[1]), _count_tiles(shape[2])
    return down * across >= FEWEST_TILES and across <= STRIP


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """The 3x3 convolution of stride 1 and padding 1, plus bias and ``residual``.

    Args:
        x: (N, H, W, C) float32, contiguous. weight: of :func:`transform_weight`. bias: (O,).
        residual: (N, H, W, O); written onto.
    Returns: (N, H, W, O), ``residual`` itself if it is given.
    """
    n, h, w, _ = x.shape
    strip = _Strip(x, weight)
    out = x.new_empty(n, h, w, strip.out_channels) if residual is None else residual
    for image, row in product(range(n), range(0, _count_tiles(h), strip.rows)):
        result = strip.convolve(x[image], RESULTS * row)
        place = out[image, RESULTS * row : RESULTS * row + len(result)]
        if bias is not None:
            result += bias
        if residual is None:
            place.copy_(result)
        else:
            place += result
    return out


class _Strip:
    """Some rows of tiles, and memory for each step of their convolution."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        _, h, w, channels = x.shape
        cells = CELLS * CELLS
        self._weight, self._width, self._across = weight, w, _count_tiles(w)
        self.out_channels = len(weight) // cells
        strip = STRIP if channels * self.out_channels >= LARGE_WEIGHT else SHORT_STRIP
        self.rows = max(1, min(_count_tiles(h), strip // self._across))
        sides = (RESULTS * self.rows + CELLS - RESULTS, RESULTS * self._across + CELLS - RESULTS)
        self._padded = x.new_zeros(*sides, channels)
        tiles = self.rows * self._across
        input_matrix, output_matrix = x.new_tensor(INPUT), x.new_tensor(OUTPUT)
        self._input_matrix = torch.kron(input_matrix, input_matrix).expand(tiles, cells, cells)
        self._output_matrix = torch.kron(output_matrix, output_matrix).expand(tiles, RESULTS * RESULTS, cells)
        self._gathered, self._transformed = x.new_empty(2, tiles, cells, channels)
        self._results = x.new_empty(tiles, RESULTS * RESULTS, self.out_channels)

    def convolve(self, image: Tensor, first: int) -> Tensor:
        """The result's rows from ``first`` on, (at most 4 ``rows``, W, O), of an image (H, W, C)."""
        self._load(image, first)
        down, across, channel = self._padded.stride()
        windows = self._padded.as_strided(
            (self.rows, self._across, CELLS, CELLS, image.shape[2]),
            (RESULTS * down, RESULTS * across, down, across, channel),
        )
        self._gathered.view(windows.shape).copy_(windows)
        torch.bmm(self._input_matrix, self._gathered, out=self._transformed)
        tiles = len(self._transformed)
        x = self._transformed.view(1, tiles, 1, -1).permute(0, 3, 1, 2)
        y = torch.ops.mkldnn._convolution_pointwise(x, self._weight, None, *GEOMETRY, "none", [], "")
        products = y.permute(0, 2, 3, 1).reshape(tiles, CELLS * CELLS, self.out_channels)
        torch.bmm(self._output_matrix, products, out=self._results)
        results = self._results.view(self.rows, self._across, RESULTS, RESULTS, -1).permute(0, 2, 1, 3, 4)
        grid = results.reshape(RESULTS * self.rows, RESULTS * self._across, -1)
        return grid[: len(image) - first, : self._width]

    def _load(self, image: Tensor, first: int) -> None:
        """Rows ``first - 1`` and on, with zeros around the image."""
        top, bottom = max(0, first - 1), min(len(image), first + RESULTS * self.rows + 1)
        start = top - (first - 1)
        inside = self._padded[start : start + bottom - top]
        if len(inside) < len(self._padded):
            self._padded.zero_()
        inside[:, 1 : 1 + self._width].copy_(image[top:bottom])


def _count_tiles(side: int) -> int:
    return -(-side // RESULTS)
