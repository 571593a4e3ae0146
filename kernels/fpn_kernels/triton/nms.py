"""Exact greedy NMS on the device: order by group and score, overlap bits within groups, fixed points side by side.

    order    three launches of :mod:`fpn_kernels.triton.nms_order`, which leave empty slots out
    overlap  which better boxes of its group overlap each box above the threshold, one bit each
    resolve  keep[i] = no kept better j overlaps i, iterated until it stands still; one program for some whole groups
    emit     a kept box's slot is the number of better kept ones

IoU is computed as the reference does, in float32, without fused multiply-adds and with IEEE division.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.nms_chunks import launch_in_chunks
from fpn_kernels.triton.nms_order import index_of, launch_order

MOST_WORDS = 1 << 24  # of overlap bits of a batch, 64 MB; what could need more goes in chunks
PROGRAMS = 1024  # of a launch: more, and those without a box cost microseconds
OVERLAP_ROWS, OVERLAP_COLUMNS, OVERLAP_WARPS = 128, 16, 4  # a thread has a row and all columns: it packs bits alone
OVERLAP_SHARES = 32  # most programs among which the words of a tile of rows are divided
SPAN = 256  # places; a program resolves the groups that begin in its span
BLOCK, RESOLVE_WARPS = 1024, 16  # boxes resolved at a time; their bits among each other, 128 KB, stay in registers
EMIT_ROWS, EMIT_COLUMNS, EMIT_WARPS = 4, 1024, 8


@triton.jit(do_not_specialize=["K", "words"])
def overlap_kernel(
    sorted_boxes, group_begins, present_counts, bits, K, words, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (any, shares, N). Bit c % 32 of word c // 32 of a row: the box at place c is better and overlaps it.

    Word w is at ``bits[w % words, row]``, from that of the first place of the row's group to its own. Were a
    group larger than promised, the words that are too many would be missing.
    """
    image = tl.program_id(2).to(tl.int64)
    plane = tl.num_programs(2).to(tl.int64) * K
    count = tl.load(present_counts + image)
    boxes = sorted_boxes + image * K
    for row in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        rows = row + tl.arange(0, ROWS)
        inside = rows < count
        begin = tl.load(group_begins + image * K + rows, mask=inside, other=0)
        ax1 = tl.load(boxes + rows, mask=inside, other=0.0)[None, :]
        ay1 = tl.load(boxes + plane + rows, mask=inside, other=0.0)[None, :]
        ax2 = tl.load(boxes + 2 * plane + rows, mask=inside, other=0.0)[None, :]
        ay2 = tl.load(boxes + 3 * plane + rows, mask=inside, other=0.0)[None, :]
        a_area = tl.load(boxes + 4 * plane + rows, mask=inside, other=0.0)[None, :]
        first_word = tl.load(group_begins + image * K + row) // 32 + tl.program_id(1)
        last_word = (tl.minimum(row + ROWS, count) - 1) // 32
        for word in range(first_word, last_word + 1, tl.num_programs(1)):
            packed = tl.zeros([ROWS], tl.int32)
            for bit in tl.static_range(0, 32, COLUMNS):
                at = (
                    boxes + word * 32 + bit + tl.arange(0, COLUMNS)
                )  # past the last box there is room, and no bit below
                bx1 = tl.load(at)[:, None]
                by1 = tl.load(at + plane)[:, None]
                bx2 = tl.load(at + 2 * plane)[:, None]
                by2 = tl.load(at + 3 * plane)[:, None]
                b_area = tl.load(at + 4 * plane)[:, None]
                width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
                height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
                shared = width * height
                iou = tl.div_rn(shared, (b_area + a_area) - shared)  # NaN where nothing has an area: not above
                packed |= tl.sum((iou > threshold).to(tl.int32) << (bit + tl.arange(0, COLUMNS))[:, None], axis=0)
            before = rows - word * 32  # bits of better boxes, those below that of the row itself
            packed &= tl.where(before < 32, (1 << tl.minimum(tl.maximum(before, 0), 31)) - 1, -1)
            packed &= -1 << tl.minimum(tl.maximum(begin - word * 32, 0), 31)
            own = inside & (word >= begin // 32) & (word <= rows // 32) & (word > rows // 32 - words)
            tl.store(bits + (image * words + word % words) * K + rows, packed, mask=own)


@triton.jit
def _row_of(word, words, COUNT: tl.constexpr):
    """(COUNT,) rows of the bits of the words from ``word`` on; at most ``words`` of them, so that none comes twice."""
    row = word % words + tl.arange(0, COUNT)
    return tl.where(row < words, row, row - words)


@triton.jit
def _next_group(group_begins, group_ends, place, count):
    """The first place from ``place`` on at which a group begins, or ``count``."""
    begin = tl.load(group_begins + place, mask=place < count, other=0)
    end = tl.load(group_ends + place, mask=place < count, other=0)
    return tl.where(place < count, tl.where(begin == place, place, end), count)


@triton.jit(do_not_specialize=["K", "words"])
def resolve_kernel(
    bits, sorted_keys, group_begins, group_ends, present_counts, kept_words, kept_keys, kept_counts, K, words,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(K / SPAN), N). The keys of kept boxes, in any order, of the groups that begin in a span."""
    image = tl.program_id(1).to(tl.int64)
    block_words: tl.constexpr = BLOCK // 32
    first = image * K
    bits += image * words * K
    kept_words += image * (K // 32 + 1)
    count = tl.load(present_counts + image)
    if tl.program_id(0) * SPAN < count:
        begin = _next_group(group_begins + first, group_ends + first, tl.program_id(0) * SPAN, count)
        end = _next_group(group_begins + first, group_ends + first, (tl.program_id(0) + 1) * SPAN, count)
        first_base = begin // 32 * 32
        base = tl.where(begin < end, first_base, end)
        while base < end:
            places = base + tl.arange(0, BLOCK)
            eligible = (places >= begin) & (places < end)
            key = tl.load(sorted_keys + first + places, mask=eligible, other=0)
            lowest = tl.load(group_begins + first + places, mask=eligible, other=0) // 32
            lowest = tl.maximum(lowest, places // 32 - words + 1)
            highest = tl.where(eligible, places // 32, -1)
            for earlier in range(first_base, base, BLOCK):
                word = earlier // 32 + tl.arange(0, block_words)
                written = (word[:, None] >= lowest[None, :]) & (word[:, None] <= highest[None, :])
                before = tl.load(
                    bits + _row_of(earlier // 32, words, block_words)[:, None] * K + places[None, :],
                    mask=written,
                    other=0,
                )
                known = tl.load(kept_words + word)
                eligible &= tl.max(((before & known[:, None]) != 0).to(tl.int32), axis=0) == 0
            word = base // 32 + tl.arange(0, block_words)
            written = (word[:, None] >= lowest[None, :]) & (word[:, None] <= highest[None, :])
            among = tl.load(
                bits + _row_of(base // 32, words, block_words)[:, None] * K + places[None, :], mask=written, other=0
            )
            alone = eligible
            packed = tl.zeros([block_words], tl.int32)
            changed = 1
            while changed > 0:
                packed = tl.sum(tl.reshape(alone.to(tl.int32), [block_words, 32]) << tl.arange(0, 32)[None, :], axis=1)
                settled = eligible & (tl.max(((among & packed[:, None]) != 0).to(tl.int32), axis=0) == 0)
                changed = tl.sum((settled != alone).to(tl.int32), axis=0)
                alone = settled
            chosen = alone.to(tl.int32)
            to = tl.atomic_add(kept_counts + image, tl.sum(chosen, axis=0), sem="relaxed")
            tl.store(kept_keys + first + to + tl.cumsum(chosen, axis=0) - chosen, key, mask=alone)
            base += BLOCK
            if base < end:  # not the last word of all, which the next program's groups may share
                tl.store(kept_words + word, packed)
                tl.debug_barrier()  # other threads of this program read them next time


@triton.jit(do_not_specialize=["K", "max_out"])
def emit_kernel(
    kept_keys, kept_counts, keep, counts, K, max_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Grid (any, N). The indices of kept boxes, best first, and -1 behind them."""
    image = tl.program_id(1).to(tl.int64)
    kept = tl.load(kept_counts + image)
    kept_keys += image * K
    keep += image * max_out
    for row in range(tl.program_id(0) * ROWS, kept, tl.num_programs(0) * ROWS):
        rows = row + tl.arange(0, ROWS)
        key = tl.load(kept_keys + rows, mask=rows < kept, other=0)
        before = tl.zeros([ROWS, COLUMNS], tl.int32)
        for column in range(0, kept, COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            other = tl.load(kept_keys + columns, mask=columns < kept, other=-0x7FFFFFFFFFFFFFFF)  # below -inf's
            before += (other[None, :] > key[:, None]).to(tl.int32)
        to = tl.sum(before, axis=1)
        tl.store(keep + to, index_of(key), mask=(rows < kept) & (to < max_out))
    for slot in range(tl.program_id(0) * COLUMNS, max_out, tl.num_programs(0) * COLUMNS):
        slots = slot + tl.arange(0, COLUMNS)
        tl.store(keep + slots, tl.zeros([COLUMNS], tl.int64) - 1, mask=(slots >= kept) & (slots < max_out))
    if tl.program_id(0) == 0:
        tl.store(counts + image, tl.minimum(kept, max_out).to(tl.int64))


def launch_padded_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_out: int, largest_group: int | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`fpn_kernels.padded_nms`, on the device of ``boxes``, without a word to the host."""
    n, k = scores.shape
    device = boxes.device
    words = max(triton.cdiv(k if largest_group is None else min(k, largest_group), 32) + 1, BLOCK // 32)
    if n * k == 0:
        keep = torch.full((n, max_out), -1, dtype=torch.int64, device=device)
        return keep, torch.zeros(n, dtype=torch.int64, device=device)
    if n * k * words > MOST_WORDS:
        return launch_in_chunks(boxes, scores, groups, iou_threshold, max_out)

    keep = torch.empty(n, max_out, dtype=torch.int64, device=device)
    counts = torch.empty(n, dtype=torch.int64, device=device)
    kept_keys = torch.empty(n, k, dtype=torch.int64, device=device)
    kept_words = torch.empty(n, k // 32 + 1, dtype=torch.int32, device=device)
    bits = torch.empty(n, words, k, dtype=torch.int32, device=device)
    share = triton.cdiv(PROGRAMS, n)
    overlap_tiles = min(triton.cdiv(k, OVERLAP_ROWS), share)
    exact = {"enable_fp_fusion": False}

    order = launch_order(boxes, scores, groups, share)
    sorted_boxes, sorted_keys, group_begins, group_ends, present_counts, kept_counts = order
    overlap_kernel[(overlap_tiles, min(OVERLAP_SHARES, triton.cdiv(share, overlap_tiles)), n)](
        sorted_boxes, group_begins, present_counts, bits, k, words, iou_threshold,
        ROWS=OVERLAP_ROWS, COLUMNS=OVERLAP_COLUMNS, num_warps=OVERLAP_WARPS, **exact,
    )  # fmt: skip
    resolve_kernel[(triton.cdiv(k, SPAN), n)](
        bits, sorted_keys, group_begins, group_ends, present_counts, kept_words, kept_keys, kept_counts, k,
        words, SPAN=SPAN, BLOCK=BLOCK, num_warps=RESOLVE_WARPS, **exact,
    )  # fmt: skip
    emit_kernel[(min(triton.cdiv(k, EMIT_ROWS), share), n)](
        kept_keys, kept_counts, keep, counts, k, max_out,
        ROWS=EMIT_ROWS, COLUMNS=EMIT_COLUMNS, num_warps=EMIT_WARPS, **exact,
    )  # fmt: skip
    return keep, counts


BUILDS = (
    Build(
        kernel=overlap_kernel,
        signature={
            "sorted_boxes": "*fp32", "group_begins": "*i32", "present_counts": "*i32", "bits": "*i32", "K": "i32",
            "words": "i32", "threshold": "fp32",
        },
        constants={"ROWS": OVERLAP_ROWS, "COLUMNS": OVERLAP_COLUMNS},
        num_warps=OVERLAP_WARPS,
    ),
    Build(
        kernel=resolve_kernel,
        signature={
            "bits": "*i32", "sorted_keys": "*i64", "group_begins": "*i32", "group_ends": "*i32",
            "present_counts": "*i32", "kept_words": "*i32", "kept_keys": "*i64", "kept_counts": "*i32", "K": "i32",
            "words": "i32",
        },
        constants={"SPAN": SPAN, "BLOCK": BLOCK},
        num_warps=RESOLVE_WARPS,
    ),
    Build(
        kernel=emit_kernel,
        signature={
            "kept_keys": "*i64", "kept_counts": "*i32", "keep": "*i64", "counts": "*i64", "K": "i32", "max_out": "i32",
        },
        constants={"ROWS": EMIT_ROWS, "COLUMNS": EMIT_COLUMNS},
        num_warps=EMIT_WARPS,
    ),
)  # fmt: skip
