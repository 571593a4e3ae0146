"""Exact greedy NMS in chunks of the sorted boxes, for more of them than :mod:`fpn_kernels.triton.nms` has room for.

    gather    boxes in the order that a stable radix sort gave
    suppress  boxes of a chunk against those kept of earlier chunks
    overlap   within a chunk, which better boxes of its group overlap each box above the threshold, one bit each
    resolve   keep[i] = no kept j < i overlaps i, iterated until it stands still, 1024 boxes at a time

A chunk that begins after ``max_out`` boxes are kept does nothing. IoU as in :mod:`fpn_kernels.triton.nms`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.boxes import is_present
from fpn_kernels.triton.builds import Build

CHUNK = 8192  # 8 MB of bits per image
BLOCK = 1024  # boxes resolved at a time; their bits among each other, 128 KB, stay in registers
GATHER_ROWS = 1024
OVERLAP_ROWS, OVERLAP_COLUMNS, OVERLAP_WARPS = 16, 64, 8  # larger tiles a warp spill in some versions of Triton
OVERLAP_SHARES = 8  # programs among which a row of tiles is divided; with one a tile, most would have nothing to do
SUPPRESS_ROWS, SUPPRESS_COLUMNS = 32, 64


@triton.jit
def _write_sorted(boxes, groups, at, to, sorted_boxes, sorted_groups, plane, mask):
    """Box ``at`` to place ``to`` of the planes x1, y1, x2, y2, area; ``plane`` is the length of one."""
    x1 = tl.load(boxes + at * 4, mask=mask)
    y1 = tl.load(boxes + at * 4 + 1, mask=mask)
    x2 = tl.load(boxes + at * 4 + 2, mask=mask)
    y2 = tl.load(boxes + at * 4 + 3, mask=mask)
    tl.store(sorted_boxes + to, x1, mask=mask)
    tl.store(sorted_boxes + plane + to, y1, mask=mask)
    tl.store(sorted_boxes + 2 * plane + to, x2, mask=mask)
    tl.store(sorted_boxes + 3 * plane + to, y2, mask=mask)
    tl.store(sorted_boxes + 4 * plane + to, (x2 - x1) * (y2 - y1), mask=mask)
    tl.store(sorted_groups + to, tl.load(groups + at, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["K"])
def gather_kernel(
    boxes, scores, groups, order, sorted_boxes, sorted_groups, present_counts, K, ROWS: tl.constexpr
):  # fmt: skip
    """Grid (ceil(K / ROWS), N). Boxes in an order that sorting gave, the present ones first."""
    image = tl.program_id(1).to(tl.int64)
    plane = tl.num_programs(1).to(tl.int64) * K
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = places < K
    at = image * K + tl.load(order + image * K + places, mask=inside, other=0)
    present = is_present(boxes, scores, at, inside)
    _write_sorted(boxes, groups, at, image * K + places, sorted_boxes, sorted_groups, plane, present)
    tl.atomic_add(present_counts + image, tl.sum(present.to(tl.int32), axis=0))


@triton.jit
def _overlap(sorted_boxes, sorted_groups, plane, worse, better, worse_inside, better_inside, threshold):
    """Whether each of ``worse`` (R,) has IoU > threshold with each of ``better`` (C,) of its group: (R, C)."""
    ax1 = tl.load(sorted_boxes + worse, mask=worse_inside, other=0.0)[:, None]
    ay1 = tl.load(sorted_boxes + plane + worse, mask=worse_inside, other=0.0)[:, None]
    ax2 = tl.load(sorted_boxes + 2 * plane + worse, mask=worse_inside, other=0.0)[:, None]
    ay2 = tl.load(sorted_boxes + 3 * plane + worse, mask=worse_inside, other=0.0)[:, None]
    a_area = tl.load(sorted_boxes + 4 * plane + worse, mask=worse_inside, other=0.0)[:, None]
    a_group = tl.load(sorted_groups + worse, mask=worse_inside, other=0)[:, None]
    bx1 = tl.load(sorted_boxes + better, mask=better_inside, other=0.0)[None, :]
    by1 = tl.load(sorted_boxes + plane + better, mask=better_inside, other=0.0)[None, :]
    bx2 = tl.load(sorted_boxes + 2 * plane + better, mask=better_inside, other=0.0)[None, :]
    by2 = tl.load(sorted_boxes + 3 * plane + better, mask=better_inside, other=0.0)[None, :]
    b_area = tl.load(sorted_boxes + 4 * plane + better, mask=better_inside, other=0.0)[None, :]
    b_group = tl.load(sorted_groups + better, mask=better_inside, other=0)[None, :]
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    shared = width * height
    iou = tl.div_rn(shared, (b_area + a_area) - shared)  # NaN where nothing has an area: not above
    return (iou > threshold) & (a_group == b_group) & worse_inside[:, None] & better_inside[None, :]


@triton.jit(do_not_specialize=["K", "start", "max_out"])
def suppress_chunk_kernel(
    sorted_boxes, sorted_groups, present_counts, kept_places, kept_counts, alive,
    K, start, max_out, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (CHUNK / ROWS, N). ``alive``: which boxes of the chunk no kept box of an earlier one overlaps."""
    image = tl.program_id(1).to(tl.int64)
    plane = tl.num_programs(1).to(tl.int64) * K
    slots = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    places = start + slots
    inside = places < tl.load(present_counts + image)
    kept = tl.load(kept_counts + image)
    if (kept < max_out) & (tl.max(inside.to(tl.int32), axis=0) > 0):
        hit = tl.zeros([ROWS], tl.int32)
        for base in range(0, kept, COLUMNS):
            columns = base + tl.arange(0, COLUMNS)
            better = tl.load(kept_places + image * K + columns, mask=columns < kept, other=0)
            over = _overlap(
                sorted_boxes + image * K, sorted_groups + image * K, plane, places, better, inside, columns < kept,
                threshold,
            )  # fmt: skip
            hit = tl.maximum(hit, tl.max(over.to(tl.int32), axis=1))
        tl.store(alive + image * CHUNK + slots, (hit == 0).to(tl.int8))


@triton.jit(do_not_specialize=["K", "start", "max_out"])
def overlap_chunk_kernel(
    sorted_boxes, sorted_groups, present_counts, kept_counts, bits,
    K, start, max_out, threshold,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (CHUNK / ROWS, shares, N). Bit j of row i: box j of the chunk is better and overlaps box i."""
    image = tl.program_id(2).to(tl.int64)
    plane = tl.num_programs(2).to(tl.int64) * K
    count = tl.load(present_counts + image) - start
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    if (row < count) & (tl.load(kept_counts + image) < max_out):
        for column in range(tl.program_id(1) * COLUMNS, row + ROWS, tl.num_programs(1) * COLUMNS):
            columns = column + tl.arange(0, COLUMNS)
            over = _overlap(
                sorted_boxes + image * K, sorted_groups + image * K, plane, start + rows, start + columns,
                rows < count, columns < count, threshold,
            )  # fmt: skip
            over &= columns[None, :] < rows[:, None]
            words = tl.reshape(over.to(tl.int32), [ROWS, COLUMNS // 32, 32]) << tl.arange(0, 32)[None, None, :]
            word = column // 32 + tl.arange(0, COLUMNS // 32)
            at = (image * CHUNK + rows[:, None]) * (CHUNK // 32) + word[None, :]
            tl.store(bits + at, tl.sum(words, axis=2))


@triton.jit(do_not_specialize=["K", "start", "max_out"])
def resolve_chunk_kernel(
    bits, alive, order, present_counts, kept_words, kept_places, kept_counts, keep, counts,
    K, start, max_out,
    IS_FIRST: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (N,). Which boxes of the chunk are kept, given which better ones of it each overlaps."""
    image = tl.program_id(0).to(tl.int64)
    words: tl.constexpr = BLOCK // 32
    count = tl.load(present_counts + image) - start
    kept = 0
    if not IS_FIRST:
        kept = tl.load(kept_counts + image)
    base = 0
    while (base < count) & (base < CHUNK) & (kept < max_out):
        slots = base + tl.arange(0, BLOCK)
        eligible = slots < count
        if not IS_FIRST:
            eligible &= tl.load(alive + image * CHUNK + slots, mask=eligible, other=0) != 0
        row = (image * CHUNK + slots[:, None]) * (CHUNK // 32) + tl.arange(0, words)[None, :]
        for earlier in range(0, base, BLOCK):
            word = earlier // 32 + tl.arange(0, words)
            before = tl.load(bits + row + earlier // 32, mask=(slots < count)[:, None], other=0)
            known = tl.load(kept_words + image * (CHUNK // 32) + word)
            eligible &= tl.max(((before & known[None, :]) != 0).to(tl.int32), axis=1) == 0
        # Words beyond the diagonal belong to worse boxes and were never written.
        better = (slots < count)[:, None] & (base + 32 * tl.arange(0, words)[None, :] <= slots[:, None])
        among = tl.load(bits + row + base // 32, mask=better, other=0)
        alone = eligible
        packed = tl.zeros([words], tl.int32)
        changed = 1
        while changed > 0:
            packed = tl.sum(tl.reshape(alone.to(tl.int32), [words, 32]) << tl.arange(0, 32)[None, :], axis=1)
            settled = eligible & (tl.max(((among & packed[None, :]) != 0).to(tl.int32), axis=1) == 0)
            changed = tl.sum((settled != alone).to(tl.int32), axis=0)
            alone = settled
        tl.store(kept_words + image * (CHUNK // 32) + base // 32 + tl.arange(0, words), packed)
        chosen = alone.to(tl.int32)
        to = kept + tl.cumsum(chosen, axis=0) - chosen
        index = tl.load(order + image * K + start + slots, mask=alone, other=0)
        tl.store(keep + image * max_out + to, index, mask=alone & (to < max_out))
        tl.store(kept_places + image * K + to, start + slots, mask=alone)
        kept += tl.sum(chosen, axis=0)
        base += BLOCK
        tl.debug_barrier()  # the words written are read by other threads of this program next time
    tl.store(kept_counts + image, kept)
    tl.store(counts + image, tl.minimum(kept, max_out).to(tl.int64))


def launch_in_chunks(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_out: int
) -> tuple[Tensor, Tensor]:
    """As :func:`fpn_kernels.padded_nms` for N and K of at least 1, without a word to the host."""
    n, k = scores.shape
    device = boxes.device
    keep = torch.full((n, max_out), -1, dtype=torch.int64, device=device)
    counts = torch.empty(n, dtype=torch.int64, device=device)
    boxes, scores, groups = boxes.contiguous(), scores.contiguous(), groups.contiguous()
    chunk = min(CHUNK, triton.cdiv(k, BLOCK) * BLOCK)
    sorted_boxes = torch.empty(5, n, k, dtype=torch.float32, device=device)
    sorted_groups = torch.empty(n, k, dtype=torch.int64, device=device)
    present_counts, kept_counts = torch.zeros(2, n, dtype=torch.int32, device=device)
    kept_places = torch.empty(n, k, dtype=torch.int32, device=device)
    kept_words = torch.empty(n, chunk // 32, dtype=torch.int32, device=device)
    bits = torch.empty(n, chunk, chunk // 32, dtype=torch.int32, device=device)
    alive = torch.empty(n, chunk, dtype=torch.int8, device=device)
    exact = {"enable_fp_fusion": False}

    order = _sort(boxes, scores)
    gather_kernel[(triton.cdiv(k, GATHER_ROWS), n)](
        boxes, scores, groups, order, sorted_boxes, sorted_groups, present_counts, k,
        ROWS=GATHER_ROWS, num_warps=4, **exact,
    )  # fmt: skip
    for start in range(0, k, chunk):
        if start:
            suppress_chunk_kernel[(chunk // SUPPRESS_ROWS, n)](
                sorted_boxes, sorted_groups, present_counts, kept_places, kept_counts, alive,
                k, start, max_out, iou_threshold,
                ROWS=SUPPRESS_ROWS, COLUMNS=SUPPRESS_COLUMNS, CHUNK=chunk, num_warps=4, **exact,
            )  # fmt: skip
        overlap_chunk_kernel[(chunk // OVERLAP_ROWS, OVERLAP_SHARES, n)](
            sorted_boxes, sorted_groups, present_counts, kept_counts, bits,
            k, start, max_out, iou_threshold,
            ROWS=OVERLAP_ROWS, COLUMNS=OVERLAP_COLUMNS, CHUNK=chunk, num_warps=OVERLAP_WARPS, **exact,
        )  # fmt: skip
        resolve_chunk_kernel[(n,)](
            bits, alive, order, present_counts, kept_words, kept_places, kept_counts, keep, counts,
            k, start, max_out,
            IS_FIRST=start == 0, BLOCK=BLOCK, CHUNK=chunk, num_warps=16, **exact,
        )  # fmt: skip
    return keep, counts


def _sort(boxes: Tensor, scores: Tensor) -> Tensor:
    """(N, K) int64 indices by descending score, ties by lower index, absent boxes last."""
    present = ~(scores.isnan() | (scores == -torch.inf)) & boxes.isfinite().all(dim=-1)
    scores = torch.where(present, scores + 0.0, -torch.inf)
    return scores.sort(dim=1, descending=True, stable=True).indices


_SORTED = {
    "boxes": "*fp32", "scores": "*fp32", "groups": "*i64", "order": "*i64", "sorted_boxes": "*fp32",
    "sorted_groups": "*i64", "present_counts": "*i32", "K": "i32",
}  # fmt: skip
_CHUNKED = {"K": "i32", "start": "i32", "max_out": "i32"}
_TABLES = {"sorted_boxes": "*fp32", "sorted_groups": "*i64", "present_counts": "*i32"}
BUILDS = (
    Build(kernel=gather_kernel, signature=_SORTED, constants={"ROWS": GATHER_ROWS}),
    Build(
        kernel=suppress_chunk_kernel,
        signature={
            **_TABLES, "kept_places": "*i32", "kept_counts": "*i32", "alive": "*i8", **_CHUNKED, "threshold": "fp32",
        },
        constants={"ROWS": SUPPRESS_ROWS, "COLUMNS": SUPPRESS_COLUMNS, "CHUNK": CHUNK},
    ),
    Build(
        kernel=overlap_chunk_kernel,
        signature={**_TABLES, "kept_counts": "*i32", "bits": "*i32", **_CHUNKED, "threshold": "fp32"},
        constants={"ROWS": OVERLAP_ROWS, "COLUMNS": OVERLAP_COLUMNS, "CHUNK": CHUNK},
        num_warps=OVERLAP_WARPS,
    ),
    *(
        Build(
            kernel=resolve_chunk_kernel,
            variant="first" if is_first else "later",
            signature={
                "bits": "*i32", "alive": "*i8", "order": "*i64", "present_counts": "*i32", "kept_words": "*i32",
                "kept_places": "*i32", "kept_counts": "*i32", "keep": "*i64", "counts": "*i64", **_CHUNKED,
            },
            constants={"IS_FIRST": is_first, "BLOCK": BLOCK, "CHUNK": CHUNK},
            num_warps=16,
        )
        for is_first in (True, False)
    ),
)  # fmt: skip
