"""Exact top-k of every level and image: one histogram, one gathering, ranks by counting; nothing is sorted.

    histogram  how the logits of each level are spread over ``BINS`` bins, counted by many programs
    gather     every logit from the k-th best one's bin upwards goes to its level's list, in any order
    narrow     shortens a list that is longer than ``LISTED``, bit by bit down to the index; seldom has work
    rank       each key of a list counts the larger ones; the k first are written to their places

A logit and its index make one key; no two are equal, so the order of a list leaves no trace and ties go to the lower
index. The launches wait for each other and for nothing else.

At batch 1 the time is latency, not bytes: 0.5 MB of half-precision logits. One program per (image, level) would pull
182,400 logits through one multiprocessor, several times; a radix select needs a histogram, hence a launch, for every
eight to twelve bits. Here one histogram leaves the k winners and the rest of one bin, 1/32 wide; bins of equal width,
since those of a float's upper twelve bits are 1/2 wide for logits beyond -4. A bitonic sort of 2048 keys compiles to
some 4,000 instructions for each of the 16 warps of one program; counting is 2048 comparisons per key, on all
multiprocessors at once. More bins would cost time in proportion where Triton counts bin by bin, as in 3.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.selection import level_slots, select_topk_reference
from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.levels import Maps, count_blocks, find_level, pack_sizes, pick_pointer, pick_size, sum_sizes

LARGEST_K = 8192  # above, torch sorts: counting takes the square of a list's length
LISTED = 4096  # keys that are ranked as they are; at least twice the largest k
BINS = 1024  # of every histogram
BIN_BITS = 10
REACH = 16.0  # logits from -REACH to REACH share the bins evenly; those beyond are in the outermost
BLOCK = 2048  # logits per program: 122 programs for the five levels of an 800 x 1216 image
NARROW_BLOCK = 4096
RANK_ROWS, RANK_COLUMNS = 32, 256


@triton.jit
def _load_logits(levels, image_strides, channel_strides, cell_strides, level, image, index, inside, A: tl.constexpr):
    at = image * pick_size(image_strides, level)
    at += (index % A).to(tl.int64) * pick_size(channel_strides, level)
    at += (index // A).to(tl.int64) * pick_size(cell_strides, level)
    return tl.load(pick_pointer(levels, level) + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _bin_of(logit, BINS: tl.constexpr, REACH: tl.constexpr):
    """Never falls as the logit rises, since rounded sums and products do not; NaN is in the lowest bin."""
    place = (logit + REACH) * (BINS / 2 / REACH)
    place = tl.where(place > 0.0, place, 0.0)
    return tl.where(place < BINS, place, BINS - 1).to(tl.int32)


@triton.jit
def _key_of(logit, index):
    """63 bits: the upper 32 order as the logit does, NaN lowest, the others against the index."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0.0 tie with 0.0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000
    return (tl.where(logit == logit, ordered, 0) << 31) | (0x7FFFFFFF - index)


@triton.jit
def _logit_of(key):
    ordered = ((key >> 31) - 0x80000000).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return tl.where((key >> 31) == 0, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _find_bin(histogram, wanted, BINS: tl.constexpr):
    """The bin of the ``wanted``-th largest, how many are in it and how many above it."""
    bins = tl.arange(0, BINS)
    at_least = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0) + histogram
    found = tl.max(tl.where(at_least >= wanted, bins, 0), axis=0)
    within = tl.sum(tl.where(bins == found, histogram, 0), axis=0)
    return found, within, tl.sum(tl.where(bins > found, histogram, 0), axis=0)


@triton.jit
def bin_logits_kernel(
    levels, image_strides, channel_strides, cell_strides, sizes, histograms,
    A: tl.constexpr, BINS: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of all levels, N). ``histograms``: (N, L, BINS), zeros before."""
    image = tl.program_id(1).to(tl.int64)
    level, block = find_level(tl.program_id(0), sizes, BLOCK)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < pick_size(sizes, level)
    logit = _load_logits(levels, image_strides, channel_strides, cell_strides, level, image, index, inside, A)
    found = tl.histogram(_bin_of(logit, BINS, REACH), BINS, mask=inside)
    at = histograms + (image * len(sizes) + level) * BINS + tl.arange(0, BINS)
    tl.atomic_add(at, found, mask=found > 0, sem="relaxed")


@triton.jit
def gather_logits_kernel(
    levels, image_strides, channel_strides, cell_strides, sizes, slots, histograms, counts, keys,
    A: tl.constexpr, BINS: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of all levels, N). ``counts``: (N, L), the lengths of the lists, zeros before."""
    image = tl.program_id(1).to(tl.int64)
    level, block = find_level(tl.program_id(0), sizes, BLOCK)
    table = image * len(sizes) + level
    histogram = tl.load(histograms + table * BINS + tl.arange(0, BINS))
    lowest, _, _ = _find_bin(histogram, pick_size(slots, level), BINS)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < pick_size(sizes, level)
    logit = _load_logits(levels, image_strides, channel_strides, cell_strides, level, image, index, inside, A)
    chosen = inside & (_bin_of(logit, BINS, REACH) >= lowest)
    number = tl.sum(chosen.to(tl.int32), axis=0)
    if number > 0:
        to = tl.atomic_add(counts + table, number, sem="relaxed") + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        keys += image * sum_sizes(sizes, len(sizes)) + sum_sizes(sizes, level)
        tl.store(keys + to, _key_of(logit, index), mask=chosen)


@triton.jit
def narrow_lists_kernel(
    sizes, slots, counts, keys, LISTED: tl.constexpr, BINS: tl.constexpr, BIN_BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (L, N). Drops keys below the k-th from a list that is longer than ``LISTED``."""
    image = tl.program_id(1).to(tl.int64)
    level = tl.program_id(0)
    count = tl.load(counts + image * len(sizes) + level)
    if count > LISTED:
        keys += image * sum_sizes(sizes, len(sizes)) + sum_sizes(sizes, level)
        lowest = tl.full((), 0, tl.int64)  # of the range in which the k-th key lies, 2^width long
        width = tl.full((), 63, tl.int64)
        above = 0
        left = count
        while left > LISTED:
            bits = tl.minimum(width, BIN_BITS)
            width -= bits
            histogram = tl.zeros([BINS], tl.int32)
            for start in range(0, count, BLOCK):
                at = start + tl.arange(0, BLOCK)
                place = (tl.load(keys + at, mask=at < count, other=-1) - lowest) >> width
                within_range = (place >= 0) & ((place >> bits) == 0)
                histogram += tl.histogram((place & (BINS - 1)).to(tl.int32), BINS, mask=within_range)
            found, within, more = _find_bin(histogram, pick_size(slots, level) - above, BINS)
            lowest += found.to(tl.int64) << width
            above += more
            left = above + within
        done = 0
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < count, other=-1)
            chosen = key >= lowest
            to = done + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.debug_barrier()  # all of the block is read before any of it is overwritten
            tl.store(keys + to, key, mask=chosen)
            done += tl.sum(chosen.to(tl.int32), axis=0)
        tl.store(counts + image * len(sizes) + level, done)


@triton.jit
def rank_logits_kernel(
    sizes, longest, slots, counts, keys, logits, indices, levels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Grid (blocks of the ``longest`` lists that may be, N). A key's place is the number of larger keys."""
    image = tl.program_id(1).to(tl.int64)
    level, block = find_level(tl.program_id(0), longest, ROWS)
    count = tl.load(counts + image * len(sizes) + level)
    if block * ROWS < count:
        keys += image * sum_sizes(sizes, len(sizes)) + sum_sizes(sizes, level)
        rows = block * ROWS + tl.arange(0, ROWS)
        key = tl.load(keys + rows, mask=rows < count, other=0)
        before = tl.zeros([ROWS], tl.int32)
        for start in range(0, count, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            other = tl.load(keys + columns, mask=columns < count, other=-1)
            before += tl.sum((other[None, :] > key[:, None]).to(tl.int32), axis=1)
        chosen = (rows < count) & (before < pick_size(slots, level))
        slot = sum_sizes(slots, level) + before
        at = image * sum_sizes(slots, len(slots)) + slot
        tl.store(logits + at, _logit_of(key), mask=chosen)
        tl.store(indices + at, 0x7FFFFFFF - (key & 0x7FFFFFFF), mask=chosen)
        if image == 0:
            tl.store(levels + slot, tl.zeros([ROWS], tl.int64) + level, mask=chosen)


def launch_select_topk(objectness: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fpn_kernels.select_topk`, without a word to the host; a logit of -0.0 comes back as 0.0.

    For k above ``LARGEST_K`` the reference runs, which sorts and does not ask the host either.
    """
    n, a = objectness[0].shape[:2]
    device = objectness[0].device
    sizes = [a * level.shape[2] * level.shape[3] for level in objectness]
    slots = level_slots(sizes, k)
    if k > LARGEST_K or n * sum(slots) == 0:
        return select_topk_reference(objectness, k)
    logits = torch.empty(n, sum(slots), dtype=torch.float32, device=device)
    indices = torch.empty(n, sum(slots), dtype=torch.int64, device=device)
    levels = torch.empty(sum(slots), dtype=torch.int64, device=device)
    tables = n * len(sizes)
    zeros = torch.zeros(tables * (BINS + 1), dtype=torch.int32, device=device)
    histograms, counts = zeros.split([tables * BINS, tables])
    keys = torch.empty(n, sum(sizes), dtype=torch.int64, device=device)
    maps = Maps(objectness)
    listed = max(LISTED, 2 * triton.next_power_of_2(k))
    longest = [min(size, listed) for size in sizes]
    packed = pack_sizes(sizes), pack_sizes(slots)
    grid = count_blocks(sizes, BLOCK), n
    exact = {"enable_fp_fusion": False}

    bin_logits_kernel[grid](
        maps.pointers, *maps.strides, packed[0], histograms, A=a, BINS=BINS, REACH=REACH, BLOCK=BLOCK, num_warps=8,
        **exact,
    )  # fmt: skip
    gather_logits_kernel[grid](
        maps.pointers, *maps.strides, *packed, histograms, counts, keys,
        A=a, BINS=BINS, REACH=REACH, BLOCK=BLOCK, num_warps=8, **exact,
    )  # fmt: skip
    if max(sizes) > listed:
        narrow_lists_kernel[(len(sizes), n)](
            *packed, counts, keys, LISTED=listed, BINS=BINS, BIN_BITS=BIN_BITS, BLOCK=NARROW_BLOCK, num_warps=8,
            **exact,
        )  # fmt: skip
    rank_logits_kernel[(count_blocks(longest, RANK_ROWS), n)](
        packed[0], pack_sizes(longest), packed[1], counts, keys, logits, indices, levels,
        ROWS=RANK_ROWS, COLUMNS=RANK_COLUMNS, num_warps=4, **exact,
    )  # fmt: skip
    return logits, indices, levels


def _builds() -> Iterator[Build]:
    """Five levels of three anchors; those that read logits also in single precision."""
    five = ("i32",) * 5
    sizes = {"sizes": five, "slots": five}
    binned = {"BINS": BINS, "REACH": REACH, "A": 3, "BLOCK": BLOCK}
    for dtype in ("fp16", "fp32"):
        maps: dict[str, str | tuple[str, ...]] = {
            "levels": (f"*{dtype}",) * 5, "image_strides": five, "channel_strides": five, "cell_strides": five,
            "sizes": five,
        }  # fmt: skip
        signature = {**maps, "histograms": "*i32"}
        yield Build(kernel=bin_logits_kernel, variant=dtype, signature=signature, constants=binned, num_warps=8)
        signature = {**maps, **sizes, "histograms": "*i32", "counts": "*i32", "keys": "*i64"}
        yield Build(kernel=gather_logits_kernel, variant=dtype, signature=signature, constants=binned, num_warps=8)
    yield Build(
        kernel=narrow_lists_kernel,
        signature={**sizes, "counts": "*i32", "keys": "*i64"},
        constants={"LISTED": LISTED, "BINS": BINS, "BIN_BITS": BIN_BITS, "BLOCK": NARROW_BLOCK},
        num_warps=8,
    )
    yield Build(
        kernel=rank_logits_kernel,
        signature={
            **sizes, "longest": five, "counts": "*i32", "keys": "*i64", "logits": "*fp32", "indices": "*i64",
            "levels": "*i64",
        },
        constants={"ROWS": RANK_ROWS, "COLUMNS": RANK_COLUMNS},
    )  # fmt: skip


BUILDS = tuple(_builds())
