"""Several levels in one launch: their pointers and sizes as tuples, and which of them a program works on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def pack_sizes(sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes as odd numbers from 3 on: Triton compiles anew for a 1 and for multiples of 16, which these never are."""
    return tuple(2 * size + 3 for size in sizes)


@triton.jit
def _unpack_size(size):
    return (size >> 1) - 1


@triton.jit
def pick_size(sizes, level):
    """The size of ``level``, of a tuple that :func:`pack_sizes` made."""
    chosen = sizes[0]
    for i in tl.static_range(1, len(sizes)):
        chosen = tl.where(level == i, sizes[i], chosen)
    return _unpack_size(chosen)


@triton.jit
def pick_pointer(pointers, level):
    """The pointer of ``level``."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(level == i, pointers[i], chosen)
    return chosen


@triton.jit
def sum_sizes(sizes, level):
    """The sizes of the levels before ``level`` together; of all levels for their number."""
    total = 0
    for i in tl.static_range(len(sizes)):
        total += tl.where(i < level, _unpack_size(sizes[i]), 0)
    return total


@triton.jit
def find_level(block, sizes, BLOCK: tl.constexpr):
    """The level of a block and its place in it, where level after level fills ceil(size / BLOCK) blocks."""
    level = 0
    first = 0
    end = 0
    for i in tl.static_range(len(sizes)):
        inside = block >= end
        level = tl.where(inside, i, level)
        first = tl.where(inside, end, first)
        end += tl.cdiv(_unpack_size(sizes[i]), BLOCK)
    return level, block - first


def count_blocks(sizes: Sequence[int], block: int) -> int:
    """How many blocks :func:`find_level` tells apart."""
    return sum(triton.cdiv(size, block) for size in sizes)


class Maps:
    """(N, C, H, W) maps of all levels as a kernel reads them: no copy where cells are evenly spaced and dtypes equal.

    Attributes:
        pointers: each level's tensor, all of one dtype.
        strides: between images, channels and cells, each packed over the levels.
    """

    def __init__(self, levels: Sequence[Tensor]) -> None:
        even = [level if _cells_are_even(level) else level.contiguous() for level in levels]
        mixed = len({level.dtype for level in even}) > 1
        self.pointers = tuple(level.to(torch.float32) if mixed else level for level in even)
        strides = [(p.stride(0), p.stride(1), p.stride(3 if p.shape[3] > 1 else 2)) for p in self.pointers]
        self.strides = tuple(pack_sizes(axis) for axis in zip(*strides, strict=True))


def _cells_are_even(level: Tensor) -> bool:
    return 1 in level.shape[2:] or level.stride(2) == level.shape[3] * level.stride(3)
