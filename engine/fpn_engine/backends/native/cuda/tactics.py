"""Tactics: which implementations can do a piece of work, which are worth measuring, and which to take unmeasured.

    cudnn_fused            cuDNN's convolution with bias, residual and ReLU in one
    cudnn_epilogue         cuDNN's convolution, then bias, residual and activation in one pass
    cublas                 a matrix product of rows, with bias and ReLU in cuBLAS where it can
    triton_gemm            1x1 convolution or rows as a matrix product with all that follows
    triton_implicit_gemm   any other window the same way
    triton_few_channels    windows of up to four channels, as a stem has

The Triton ones come in tiles, whole or in shares (split-K, stream-K); see fpn_kernels.triton.convolution and, of the
last, which has no shares, fpn_kernels.triton.few_channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.ops import BFLOAT16, FLOAT32, UNIT
from fpn_kernels.triton.convolution import count_blocks, mode_for
from fpn_kernels.triton.few_channels import (
    MOST_CHANNELS,
    MOST_UNITS,
    Units,
    count_units,
    few_channels_tiles,
)
from fpn_kernels.triton.tiles import (
    FEW_CHANNELS_TILES,
    FLOAT32_TILE,
    LARGE_TILE,
    RAGGED_TILES,
    STREAM,
    TILES,
    WHOLE,
    Tile,
    count_shared_bytes,
    fit_tile,
)

CUDNN_FUSED, CUDNN_EPILOGUE, CUBLAS = "cudnn_fused", "cudnn_epilogue", "cublas"
GEMM, IMPLICIT_GEMM, FEW_CHANNELS = "triton_gemm", "triton_implicit_gemm", "triton_few_channels"
NAMES = (CUDNN_FUSED, CUDNN_EPILOGUE, CUBLAS, GEMM, IMPLICIT_GEMM, FEW_CHANNELS)
TRITON = (GEMM, IMPLICIT_GEMM, FEW_CHANNELS)
LEVELS = ("quick", "full")
SPLITS = (2, 4, 8)
FILLED = 0.75  # of the multiprocessors that tiles should keep busy
FEWEST_BLOCKS = 4  # of the depth in a share: fewer, and the pipeline of loads never fills
ENOUGH_WAVES = 4  # of tiles on all multiprocessors, beyond which shares only cost
_TEXT = re.compile(r"(\w+)(?: (\d+)x(\d+)x(\d+) w(\d+) s(\d+) /(\d+|stream))?")


@dataclass(frozen=True, slots=True)
class Tactic:
    """An implementation. ``tile`` and ``split`` are of Triton's; its text form is ``str(tactic)``."""

    name: str
    tile: Tile | None = None
    split: int = WHOLE

    def __str__(self) -> str:
        if self.tile is None:
            return self.name
        m, n, k, warps, stages = self.tile
        return f"{self.name} {m}x{n}x{k} w{warps} s{stages} /{self.split or 'stream'}"

    @classmethod
    def parse(cls, text: str) -> Tactic:
        """What :meth:`__str__` wrote. Raises ValueError for anything that is not a tactic of this version."""
        match = _TEXT.fullmatch(text)
        if match is None or match[1] not in NAMES or (match[1] in TRITON) != (match[2] is not None):
            raise ValueError(f"there is no tactic {text[:80]!r}")
        if match[2] is None:
            return cls(match[1])
        tile = Tile(*map(int, match.groups()[1:6]))
        split = STREAM if match[7] == "stream" else int(match[7])
        if match[1] == FEW_CHANNELS:
            known = tile in FEW_CHANNELS_TILES and split == WHOLE
        else:
            known = tile in (*TILES, LARGE_TILE, *RAGGED_TILES, FLOAT32_TILE) and STREAM <= split <= 64
        if not known:
            raise ValueError(f"there is no tactic {text[:80]!r}")
        return cls(match[1], tile, split)

    @property
    def makes_its_output(self) -> bool:
        """Whether it gives a tensor of its own instead of writing where it is told."""
        return self.name == CUDNN_FUSED


def supports(tactic: Tactic, work: Work, gpu: Gpu) -> bool:
    """Whether a tactic can do a piece of work on a GPU."""
    if tactic.name == CUDNN_FUSED:
        return (
            work.is_convolution
            and work.activation.kind == "relu"
            and work.dtype == work.out_dtype != FLOAT32
            and work.padding[:2] == work.padding[2:]
            and (not work.has_residual or work.upsample == UNIT)
        )
    if tactic.name == CUDNN_EPILOGUE:
        return work.is_convolution
    if tactic.name == CUBLAS:
        return not work.is_convolution
    if tactic.name == FEW_CHANNELS:
        return tactic.split == WHOLE and _has_few_channels(work) and tactic.tile in few_channels_tiles(units_of(work))
    if tactic.tile is None or work.groups != 1 or (tactic.name == GEMM) != work.is_pointwise:
        return False
    itemsize = 4 if work.dtype == FLOAT32 else 2
    if count_shared_bytes(tactic.tile, itemsize) > gpu.shared_bytes:
        return False
    if tactic.tile == LARGE_TILE and work.has_residual:
        return False
    return tactic.tile in _tiles(work)


def _has_few_channels(work: Work) -> bool:
    if not work.is_convolution or work.is_pointwise or work.groups != 1 or work.dtype == FLOAT32:
        return False
    if work.has_residual or work.dilation != UNIT or work.x[-1] > MOST_CHANNELS:
        return False
    return work.weight[1] * units_of(work).wide <= MOST_UNITS


def units_of(work: Work) -> Units:
    """How a convolution of halves and few channels reads its input."""
    return count_units(work.weight[1:3], work.x[-1], work.x[2], work.stride[1], work.padding[1], 2)


def _tiles(work: Work) -> tuple[Tile, ...]:
    """Those for the work's number type and channels."""
    if work.dtype == FLOAT32:
        return (FLOAT32_TILE,)
    channels = work.x[-1]
    even = tuple(tile for tile in (LARGE_TILE, *TILES) if channels % min(tile.k, channels) == 0 and channels % 64 == 0)
    return even or RAGGED_TILES


def candidates(work: Work, gpu: Gpu, level: str) -> list[Tactic]:
    """What to measure: at "full" everything that is supported, at "quick" the few that are most likely."""
    libraries = [Tactic(name) for name in (CUDNN_FUSED, CUDNN_EPILOGUE, CUBLAS)]
    name = GEMM if work.is_pointwise else IMPLICIT_GEMM
    kernels = []
    for tile in _tiles(work):
        tiles, blocks = count_tiles(work, tile), _count_blocks(work, tile)
        splits = [WHOLE]
        spills = tile in RAGGED_TILES and not work.is_pointwise  # with the bookkeeping of shares on top
        if tiles < ENOUGH_WAVES * gpu.processors and not spills:
            splits += [split for split in SPLITS if blocks >= FEWEST_BLOCKS * split] + [STREAM] * (blocks > 1)
        kernels += [Tactic(name, tile, split) for split in splits]
    if level == "quick":
        kernels = sorted(kernels, key=lambda tactic: _distance(tactic, work, gpu))[:4]
    if _has_few_channels(work):
        kernels = kernels if level == "full" else []
        kernels += [Tactic(FEW_CHANNELS, tile) for tile in few_channels_tiles(units_of(work))]
    chosen = choose(work, gpu)
    return list(dict.fromkeys(t for t in [chosen, *libraries, *kernels] if supports(t, work, gpu)))


def _distance(tactic: Tactic, work: Work, gpu: Gpu) -> float:
    """How far a Triton tactic is from giving every multiprocessor one or two large tiles."""
    assert tactic.tile is not None
    tile = fit_tile(tactic.tile, work.columns, work.x[-1])
    programs = count_tiles(work, tactic.tile) * max(tactic.split, 1)
    if tactic.split == STREAM:
        programs = gpu.processors
    waves = programs / gpu.processors
    idle = max(0.0, 1 - waves / FILLED) if waves < 1 else (-(-programs // gpu.processors)) / waves - 1
    reread = (tile.m + tile.n) / (tile.m * tile.n)  # bytes from the cache per product
    return 2 * idle + 16 * reread + 0.1 * (tactic.split != WHOLE)


def count_tiles(work: Work, tile: Tile) -> int:
    """Tiles of the result."""
    fitted = fit_tile(tile, work.columns, work.depth)
    return -(-work.rows // fitted.m) * -(-work.columns // fitted.n)


def _count_blocks(work: Work, tile: Tile) -> int:
    if not work.is_convolution:
        return count_blocks(fit_tile(tile, work.columns, work.depth), (1, 1), work.x[-1], 0)
    kernel = tuple(work.weight[1:3])
    size, out_size = (work.x[1], work.x[2]), (work.out[1], work.out[2])
    mode = mode_for(kernel, work.stride, (work.padding[0], work.padding[1]), size, out_size, work.x[-1])
    return count_blocks(fit_tile(tile, work.columns, work.x[-1]), kernel, work.x[-1], mode)


def choose(work: Work, gpu: Gpu) -> Tactic:
    """What to take unmeasured, a function of the work and the GPU alone.

    A product of halves goes to Triton where it saves a pass over memory, because what follows comes with it: 1x1
    convolutions, layers whose result is wider than their operands, and windows of few channels, which cuDNN would have
    filled up. It has the other windows. Its fused kernel is taken
    for residuals in bfloat16 only: its ReLU makes 0 of NaN, which float16 comes to by overflow, and where there is no
    residual torch gives it 0 times what lay in the output's memory, which may be NaN. cuBLAS has the rest of the rows.
    """
    if _has_few_channels(work):
        return Tactic(FEW_CHANNELS, FEW_CHANNELS_TILES[0])
    wider = work.dtype != work.out_dtype
    if work.dtype != FLOAT32 and work.is_pointwise and (work.is_convolution or wider):
        whole = [Tactic(GEMM, tile, WHOLE) for tile in _tiles(work)]
        fitting = [tactic for tactic in whole if supports(tactic, work, gpu) and tactic.tile != LARGE_TILE]
        filling = [t for t in fitting if t.tile and count_tiles(work, t.tile) >= FILLED * gpu.processors]
        if filling:
            return filling[0]
        shared = next((t for t in fitting if t.tile and (t.tile.m, t.tile.n) == (64, 64)), fitting[-1])
        assert shared.tile is not None
        missing = gpu.processors / count_tiles(work, shared.tile)
        most = _count_blocks(work, shared.tile) // FEWEST_BLOCKS
        split = max((s for s in (WHOLE, *SPLITS) if s <= min(missing * 1.5, most)), default=WHOLE)
        return Tactic(GEMM, shared.tile, split)
    fused = Tactic(CUDNN_FUSED)
    if work.dtype == BFLOAT16 and work.has_residual and supports(fused, work, gpu):
        return fused
    return Tactic(CUDNN_EPILOGUE if work.is_convolution else CUBLAS)
