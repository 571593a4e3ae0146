"""3x3 convolution on a CPU by Winograd's F(4x4, 3x3): a quarter of the products (Lavin and Gray 2016, sec. 4).

A tile of 4x4 results needs 6x6 cells of the input d and is A^T [(G g G^T) * (B^T d B)] A. Both transforms are linear in
the tile, so that each is one product with a 36x36 or 16x36 matrix, the Kronecker square of B^T or A^T, and the products
over channels are 36 matrix products. Strips of some tiles each keep all of it in the caches.
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
STRIP = 256  # tiles in a strip, about


class WinogradWeights(Mapping[str, Tensor]):
    """Transformed weights, (36, C, O) float32, each made when it is first asked for and shared by all that have it."""

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
    """(O, 3, 3, C) to (36, C, O), in float64 on the way."""
    window = torch.tensor(WINDOW, dtype=torch.float64)
    out_channels, _, _, channels = weight.shape
    transformed = torch.einsum("ai,bj,oijc->abco", window, window, weight.double())
    return transformed.reshape(CELLS * CELLS, channels, out_channels).to(weight.dtype).contiguous()


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
    """Whether a map (N, H, W, C) is large enough for it."""
    return _count_tiles(shape[1]) * _count_tiles(shape[2]) >= FEWEST_TILES


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """The 3x3 convolution of stride 1 and padding 1, plus bias and ``residual``.

    Args: x: (N, H, W, C) float32, contiguous. weight: (36, C, O). bias: (O,). residual: (N, H, W, O); written onto.
    Returns: (N, H, W, O), ``residual`` itself if it is given.
    """
    n, h, w, _ = x.shape
    out = x.new_empty(n, h, w, weight.shape[2]) if residual is None else residual
    strip = _Strip(x, weight)
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
        self._weight, self._width = weight, w
        self._across = _count_tiles(w)
        self.rows = max(1, min(_count_tiles(h), round(STRIP / self._across)))
        sides = (RESULTS * self.rows + CELLS - RESULTS, RESULTS * self._across + CELLS - RESULTS)
        self._padded = x.new_zeros(*sides, channels)
        input_matrix, output_matrix = x.new_tensor(INPUT), x.new_tensor(OUTPUT)
        self._input_matrix = torch.kron(input_matrix, input_matrix)
        self._output_matrix = torch.kron(output_matrix, output_matrix)
        tiles, out_channels = self.rows * self._across, weight.shape[2]
        self._gathered, self._transformed = x.new_empty(2, CELLS * CELLS, tiles * channels)
        self._products = x.new_empty(CELLS * CELLS, tiles, out_channels)
        self._results = x.new_empty(RESULTS * RESULTS, tiles * out_channels)

    def convolve(self, image: Tensor, first: int) -> Tensor:
        """The result's rows from ``first`` on, (at most 4 ``rows``, W, O), of an image (H, W, C)."""
        self._load(image, first)
        down, across, channel = self._padded.stride()
        windows = self._padded.as_strided(
            (CELLS, CELLS, self.rows, self._across, image.shape[2]),
            (down, across, RESULTS * down, RESULTS * across, channel),
        )
        self._gathered.view(windows.shape).copy_(windows)
        torch.mm(self._input_matrix, self._gathered, out=self._transformed)
        tiles = self._transformed.view(CELLS * CELLS, self.rows * self._across, image.shape[2])
        torch.bmm(tiles, self._weight, out=self._products)
        torch.mm(self._output_matrix, self._products.view(CELLS * CELLS, -1), out=self._results)
        results = self._results.view(RESULTS, RESULTS, self.rows, self._across, -1).permute(2, 0, 3, 1, 4)
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
