"""Boxes in the order in which NMS within groups wants them: by group, then descending score, ties by lower index.

    bucket  present slots are numbered within 64 buckets, the low bits of their group
    list    and written down bucket by bucket, so that nothing after it looks at an empty slot
    rank    a box's place is the number of boxes of its bucket in smaller groups, plus the better ones of its own

Nothing is sorted. Which box gets which number is left to chance, as atomics count; places do not depend on it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.boxes import is_present
from fpn_kernels.triton.builds import Build

BUCKET_BITS = 6
BUCKET_TILE, BUCKET_WARPS = 64, 8
RANK_ROWS, RANK_COLUMNS, RANK_WARPS = 8, 256, 4
RANK_ROUNDS = 1023  # of columns that are counted before ten bits could overflow


@triton.jit
def _score_key(score):
    """float32 as an int32 of the same order; 0.0 and -0.0 are equal."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def index_of(key):
    """The slot of a key, int64."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def _mix_group(group, BITS: tl.constexpr):
    """A one-to-one map of int64 whose order is by bucket first: the low bits come to the top."""
    rest: tl.constexpr = 64 - BITS
    return (group << rest) | ((group >> BITS) & ((1 << rest) - 1))


@triton.jit
def _bucket_of(mixed, BITS: tl.constexpr):
    return ((mixed >> (64 - BITS)) + (1 << (BITS - 1))).to(tl.int32)


@triton.jit(do_not_specialize=["group_stride", "K"])
def bucket_kernel(
    boxes, scores, groups, bucket_counts, numbers, group_stride, K, BITS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Grid (ceil(K / TILE), N). ``numbers``: of a present slot in its bucket, else -1; the counts are zeros before."""
    image = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, TILE)
    buckets = tl.arange(0, 1 << BITS)
    slots = tl.program_id(0) * TILE + lanes
    group = tl.load(groups + image * group_stride + slots, mask=slots < K, other=0)
    present = is_present(boxes, scores, image * K + slots, slots < K)
    number = tl.zeros([TILE], tl.int32) - 1
    if tl.max(present.to(tl.int32), axis=0) > 0:
        bucket = tl.where(present, _bucket_of(_mix_group(group, BITS), BITS), -1)
        its = bucket[:, None] == buckets[None, :]
        found = tl.sum(its.to(tl.int32), axis=0)
        base = tl.atomic_add(
            bucket_counts + image * (1 << BITS) + buckets, found, mask=found > 0, sem="relaxed"
        )  # fmt: skip
        earlier = (bucket[None, :] == bucket[:, None]) & (lanes[None, :] < lanes[:, None])
        number = tl.sum(tl.where(its, base[None, :], 0), axis=1) + tl.sum(earlier.to(tl.int32), axis=1)
        number = tl.where(present, number, -1)
    tl.store(numbers + image * K + slots, number, mask=slots < K)


@triton.jit(do_not_specialize=["group_stride", "K"])
def list_kernel(
    scores, groups, bucket_counts, numbers, keys, mixed_groups, begins, ends, present_counts, zeros,
    group_stride, K, BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(K / TILE), N). Present slots bucket by bucket, each with the limits of its bucket.

    ``keys``: score, then lower index, as one int64 that is larger the better.
    """
    image = tl.program_id(1).to(tl.int64)
    buckets = tl.arange(0, 1 << BITS)
    slots = tl.program_id(0) * TILE + tl.arange(0, TILE)
    counts = tl.load(bucket_counts + image * (1 << BITS) + buckets)
    number = tl.load(numbers + image * K + slots, mask=slots < K, other=-1)
    score = tl.load(scores + image * K + slots, mask=slots < K, other=0.0)
    group = tl.load(groups + image * group_stride + slots, mask=slots < K, other=0)
    present = number >= 0
    if tl.max(present.to(tl.int32), axis=0) > 0:
        mixed = _mix_group(group, BITS)
        bucket = _bucket_of(mixed, BITS)[:, None]
        begin = tl.sum(tl.where(buckets[None, :] < bucket, counts[None, :], 0), axis=1)
        end = tl.sum(tl.where(buckets[None, :] <= bucket, counts[None, :], 0), axis=1)
        to = image * K + begin + number
        tl.store(keys + to, (_score_key(score).to(tl.int64) << 32) | (0x7FFFFFFF - slots), mask=present)
        tl.store(mixed_groups + to, mixed, mask=present)
        tl.store(begins + to, begin, mask=present)
        tl.store(ends + to, end, mask=present)
    if tl.program_id(0) == 0:
        tl.store(present_counts + image, tl.sum(counts, axis=0))
        tl.store(zeros + image, 0)


@triton.jit(do_not_specialize=["K"])
def rank_kernel(
    boxes, keys, mixed_groups, begins, ends, present_counts, sorted_boxes, sorted_keys, group_begins, group_ends, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Grid (any, N). Listed boxes to their places: by bucket, group, descending score and index.

    ``sorted_boxes``: planes x1, y1, x2, y2 and area of (N, K); ``group_begins``, ``group_ends``: places, of each place.
    """
    image = tl.program_id(1).to(tl.int64)
    plane = tl.num_programs(1).to(tl.int64) * K
    first = image * K
    count = tl.load(present_counts + image)
    for row in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        rows = row + tl.arange(0, ROWS)
        inside = rows < count
        key = tl.load(keys + first + rows, mask=inside, other=0)
        mixed = tl.load(mixed_groups + first + rows, mask=inside, other=0)
        begin = tl.load(begins + first + row)
        end = tl.load(ends + first + tl.minimum(row + ROWS, count) - 1)
        below = tl.zeros([ROWS], tl.int32)
        equal = tl.zeros([ROWS], tl.int32)
        better = tl.zeros([ROWS], tl.int32)
        for start in range(begin, end, COLUMNS * ROUNDS):
            counted = tl.zeros([ROWS, COLUMNS], tl.int32)  # three fields of ten bits: better, equal, below
            for column in range(start, tl.minimum(start + COLUMNS * ROUNDS, end), COLUMNS):
                columns = column + tl.arange(0, COLUMNS)
                listed = columns < end
                other_key = tl.load(keys + first + columns, mask=listed, other=0)
                other_mixed = tl.load(mixed_groups + first + columns, mask=listed, other=0x7FFFFFFFFFFFFFFF)
                same = (other_mixed[None, :] == mixed[:, None]) & listed[None, :]
                its = tl.where(other_key[None, :] > key[:, None], (1 << 20) + (1 << 10), 1 << 10)
                its = tl.where(same, its, 0)
                counted += tl.where(other_mixed[None, :] < mixed[:, None], 1, its)
            below += tl.sum(counted & 1023, axis=1)
            equal += tl.sum((counted >> 10) & 1023, axis=1)
            better += tl.sum(counted >> 20, axis=1)
        to = first + begin + below + better
        box = boxes + (first + index_of(key)) * 4
        x1 = tl.load(box, mask=inside)
        y1 = tl.load(box + 1, mask=inside)
        x2 = tl.load(box + 2, mask=inside)
        y2 = tl.load(box + 3, mask=inside)
        tl.store(sorted_boxes + to, x1, mask=inside)
        tl.store(sorted_boxes + plane + to, y1, mask=inside)
        tl.store(sorted_boxes + 2 * plane + to, x2, mask=inside)
        tl.store(sorted_boxes + 3 * plane + to, y2, mask=inside)
        tl.store(sorted_boxes + 4 * plane + to, (x2 - x1) * (y2 - y1), mask=inside)
        tl.store(sorted_keys + to, key, mask=inside)
        tl.store(group_begins + to, begin + below, mask=inside)
        tl.store(group_ends + to, begin + below + equal, mask=inside)


def launch_order(
    boxes: Tensor, scores: Tensor, groups: Tensor, programs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Order the present boxes of each image.

    Args: boxes, scores, groups as :func:`fpn_kernels.padded_nms` takes them, N and K at least 1; programs: most of an
        image in the last launch.
    Returns:
        sorted_boxes: float32, planes x1, y1, x2, y2 and area of (N, K) each, with room for 32 more behind them.
        sorted_keys: (N, K) int64, larger the better, of which :func:`index_of` makes the index.
        group_begins, group_ends: (N, K) int32, the places of each place's group.
        present_counts: (N,) int32; behind them the above are undefined.
        zeros: (N,) int32, to count in.
    """
    n, k = scores.shape
    device = boxes.device
    boxes, scores = boxes.contiguous(), scores.contiguous()
    groups = groups if groups.stride(1) == 1 else groups.contiguous()
    bucket_counts = torch.zeros(n, 1 << BUCKET_BITS, dtype=torch.int32, device=device)
    # One by one, as parts of one would differ in alignment, for which Triton compiles anew.
    present_counts, zeros = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
    keys, mixed_groups, sorted_keys = (torch.empty(n, k, dtype=torch.int64, device=device) for _ in range(3))
    numbers, begins, ends, group_begins, group_ends = (
        torch.empty(n, k, dtype=torch.int32, device=device) for _ in range(5)
    )
    sorted_boxes = torch.empty(5 * n * k + 32, dtype=torch.float32, device=device)
    exact = {"enable_fp_fusion": False}

    bucket_kernel[(triton.cdiv(k, BUCKET_TILE), n)](
        boxes, scores, groups, bucket_counts, numbers, groups.stride(0), k,
        BITS=BUCKET_BITS, TILE=BUCKET_TILE, num_warps=BUCKET_WARPS, **exact,
    )  # fmt: skip
    list_kernel[(triton.cdiv(k, BUCKET_TILE), n)](
        scores, groups, bucket_counts, numbers, keys, mixed_groups, begins, ends, present_counts, zeros,
        groups.stride(0), k, BITS=BUCKET_BITS, TILE=BUCKET_TILE, num_warps=BUCKET_WARPS, **exact,
    )  # fmt: skip
    rank_kernel[(min(triton.cdiv(k, RANK_ROWS), programs), n)](
        boxes, keys, mixed_groups, begins, ends, present_counts, sorted_boxes, sorted_keys, group_begins, group_ends, k,
        ROWS=RANK_ROWS, COLUMNS=RANK_COLUMNS, ROUNDS=RANK_ROUNDS, num_warps=RANK_WARPS, **exact,
    )  # fmt: skip
    return sorted_boxes, sorted_keys, group_begins, group_ends, present_counts, zeros


_LISTED = {"keys": "*i64", "mixed_groups": "*i64", "begins": "*i32", "ends": "*i32", "present_counts": "*i32"}
_STORED = {"group_stride": "i32", "K": "i32"}
_BUCKETS = {"BITS": BUCKET_BITS, "TILE": BUCKET_TILE}
BUILDS = (
    Build(
        kernel=bucket_kernel,
        signature={
            "boxes": "*fp32", "scores": "*fp32", "groups": "*i64", "bucket_counts": "*i32", "numbers": "*i32",
            **_STORED,
        },
        constants=_BUCKETS,
        num_warps=BUCKET_WARPS,
    ),
    Build(
        kernel=list_kernel,
        signature={
            "scores": "*fp32", "groups": "*i64", "bucket_counts": "*i32", "numbers": "*i32", **_LISTED,
            "zeros": "*i32", **_STORED,
        },
        constants=_BUCKETS,
        num_warps=BUCKET_WARPS,
    ),
    Build(
        kernel=rank_kernel,
        signature={
            "boxes": "*fp32", **_LISTED, "sorted_boxes": "*fp32", "sorted_keys": "*i64", "group_begins": "*i32",
            "group_ends": "*i32", "K": "i32",
        },
        constants={"ROWS": RANK_ROWS, "COLUMNS": RANK_COLUMNS, "ROUNDS": RANK_ROUNDS},
        num_warps=RANK_WARPS,
    ),
)  # fmt: skip
