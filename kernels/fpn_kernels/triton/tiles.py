"""Tiles of a matrix product, and how programs share those of a small one; see :mod:`fpn_kernels.triton.convolution`."""

from __future__ import annotations

from typing import NamedTuple

import triton


class Tile(NamedTuple):
    """What one program computes: rows x columns, ``k`` of the depth at a time, by how many warps in how many stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# 96 KB of shared memory at most, which every target has.
TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 64, 128, 4, 3),
    Tile(64, 32, 64, 4, 8),
)
# 144 KB, for GPUs with 163 or 227; no room in its registers for a residual.
LARGE_TILE = Tile(128, 256, 64, 8, 3)
# Where channels are not a multiple of the block, and where the window is flattened: an address for every number.
RAGGED_TILES = (Tile(64, 64, 32, 4, 3), Tile(128, 64, 32, 8, 3))
# For windows of few channels; nothing is staged, the depth is unrolled.
FEW_CHANNELS_TILES = (Tile(64, 64, 32, 4, 1), Tile(128, 64, 32, 8, 1), Tile(128, 64, 32, 4, 1))
FLOAT32_TILE = Tile(64, 64, 32, 4, 3)  # no tensor cores: exact products
WHOLE, STREAM = 1, 0  # numbers of shares; others are split-K's


class Shares(NamedTuple):
    """How programs divide the steps of all tiles: see :func:`~fpn_kernels.triton.convolution.convolution_kernel`."""

    per: int
    span: int
    steps: int
    programs: int


def divide(tiles: int, blocks: int, split: int, processors: int) -> Shares:
    """The shares of ``tiles`` of ``blocks`` each; ``split`` is a number of shares per tile, or STREAM."""
    if split == STREAM:
        steps = tiles * blocks
        per = triton.cdiv(steps, min(processors, steps))
        return Shares(per, blocks, steps, triton.cdiv(steps, per))
    per = triton.cdiv(blocks, split)
    shares = triton.cdiv(blocks, per)
    return Shares(per, per * shares, tiles * per * shares, tiles * shares)


def fit_tile(tile: Tile, columns: int, depth: int) -> Tile:
    """No wider and deeper than there is something to compute; tl.dot takes no side below 16."""
    n, k = (max(triton.next_power_of_2(side), 16) for side in (columns, depth))
    return tile._replace(n=min(tile.n, n), k=min(tile.k, k))


def count_shared_bytes(tile: Tile, itemsize: int) -> int:
    """Shared memory of the operands' stages; a program needs little more."""
    return tile.stages * (tile.m + tile.n) * tile.k * itemsize
