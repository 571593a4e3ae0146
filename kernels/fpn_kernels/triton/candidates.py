"""Candidates in front of the last NMS, in two launches: score and count, then place and decode.

    score   softmax of each RoI; what exceeds the threshold is written down, anything else as -1, and counted
    place   a RoI's first slot is the sum of the counts before it, which each program forms itself: no scan between
            launches, no atomics, the order (RoI, class) by construction. The last slots are filled up as empty

The second launch reads the scores of the first rather than computing them again: two compilations of one sum need not
add in the same order, and a score at the threshold has to fall on the same side in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.decode import LOG_SIZE_LIMIT
from fpn_kernels.triton.boxes import clip_box, decode_box, exponential, store_box
from fpn_kernels.triton.builds import Build

TILE = 1024  # scores per program: 8 RoIs of 91 classes, 125 programs for 1000 RoIs
SUMMED = 1024  # counts read at a time


@triton.jit(do_not_specialize=["row_stride", "R"])
def score_candidates_kernel(
    class_logits, counts, scores, roi_counts, row_stride, R, threshold,
    K: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(R / ROWS), N). ``scores`` (N, R, K): softmax where above the threshold, else -1; K classes and one."""
    image = tl.program_id(1).to(tl.int64)
    rois = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    classes = tl.arange(0, CLASSES)
    inside = (rois < R)[:, None] & (classes <= K)[None, :]
    at = class_logits + (image * R + rois)[:, None] * row_stride + classes[None, :]
    logits = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    powers = exponential(logits - tl.max(logits, axis=1)[:, None])
    powers = tl.where(inside, powers, 0.0)
    softmax = tl.div_rn(powers, tl.broadcast_to(tl.sum(powers, axis=1)[:, None], [ROWS, CLASSES]))
    present = rois < tl.load(counts + image)
    chosen = inside & present[:, None] & (classes > 0)[None, :] & (softmax > threshold)
    to = scores + (image * R + rois)[:, None] * K + classes[None, :] - 1
    tl.store(to, tl.where(chosen, softmax, -1.0), mask=inside & (classes > 0)[None, :])
    tl.store(roi_counts + image * R + rois, tl.sum(chosen.to(tl.int32), axis=1), mask=rois < R)


@triton.jit(do_not_specialize=["row_stride", "R", "capacity"])
def place_candidates_kernel(
    scores, roi_counts, box_deltas, proposals, image_sizes, boxes, out_scores, labels, filled,
    row_stride, R, capacity, min_size, weight_x, weight_y, weight_w, weight_h,
    K: tl.constexpr, LOG_SIZE_LIMIT: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(R / ROWS), N). What was counted goes to its slots; each program empties its share of the others."""
    image = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    before = tl.zeros([SUMMED], tl.int32)
    total = tl.zeros([SUMMED], tl.int32)
    for start in range(0, R, SUMMED):
        rois = start + tl.arange(0, SUMMED)
        count = tl.load(roi_counts + image * R + rois, mask=rois < R, other=0)
        before += tl.where(rois < first, count, 0)
        total += count
    used = tl.minimum(tl.sum(total, axis=0), capacity)
    if first == 0:
        tl.store(filled + image, used.to(tl.int64))

    rois = first + tl.arange(0, ROWS)
    classes = tl.arange(0, CLASSES)
    row = image * R + rois
    inside = (rois < R)[:, None] & (classes < K)[None, :]
    score = tl.load(scores + row[:, None] * K + classes[None, :], mask=inside, other=-1.0)
    chosen = (score >= 0.0).to(tl.int32)
    in_row = tl.sum(chosen, axis=1)
    slot = (tl.sum(before, axis=0) + tl.cumsum(in_row, axis=0) - in_row)[:, None] + tl.cumsum(chosen, axis=1) - 1
    mask = (score >= 0.0) & (slot < capacity)

    delta = box_deltas + row[:, None] * row_stride + 4 * (classes + 1)[None, :]
    dx = tl.load(delta, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(delta + 1, mask=mask, other=0.0).to(tl.float32)
    dw = tl.load(delta + 2, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(delta + 3, mask=mask, other=0.0).to(tl.float32)
    one = tl.zeros([ROWS, CLASSES], tl.float32)
    x1, y1, x2, y2 = decode_box(
        tl.load(proposals + 4 * row, mask=rois < R, other=0.0)[:, None],
        tl.load(proposals + 4 * row + 1, mask=rois < R, other=0.0)[:, None],
        tl.load(proposals + 4 * row + 2, mask=rois < R, other=0.0)[:, None],
        tl.load(proposals + 4 * row + 3, mask=rois < R, other=0.0)[:, None],
        tl.div_rn(dx, one + weight_x),
        tl.div_rn(dy, one + weight_y),
        tl.div_rn(dw, one + weight_w),
        tl.div_rn(dh, one + weight_h),
        LOG_SIZE_LIMIT,
    )
    x1, y1, x2, y2 = clip_box(x1, y1, x2, y2, image_sizes, image)
    keep = (x2 - x1 >= min_size) & (y2 - y1 >= min_size)
    at = image * capacity + slot
    store_box(
        boxes, at, tl.where(keep, x1, 0.0), tl.where(keep, y1, 0.0), tl.where(keep, x2, 0.0), tl.where(keep, y2, 0.0),
        mask,
    )  # fmt: skip
    tl.store(out_scores + at, tl.where(keep, score, float("-inf")), mask=mask)
    tl.store(labels + at, tl.broadcast_to((classes + 1)[None, :], [ROWS, CLASSES]).to(tl.int64), mask=mask)

    share = tl.cdiv(capacity, tl.num_programs(0))
    end = tl.minimum((tl.program_id(0) + 1) * share, capacity)
    for start in range(tl.maximum(tl.program_id(0) * share, used), end, SUMMED):
        slots = start + tl.arange(0, SUMMED)
        empty = slots < end
        zero = tl.zeros([SUMMED], tl.float32)
        store_box(boxes, image * capacity + slots, zero, zero, zero, zero, empty)
        tl.store(out_scores + image * capacity + slots, zero - float("inf"), mask=empty)
        tl.store(labels + image * capacity + slots, zero.to(tl.int64) + 1, mask=empty)


def launch_select_candidates(
    class_logits: Tensor,
    box_deltas: Tensor,
    proposals: Tensor,
    counts: Tensor,
    image_sizes: Tensor,
    score_thresh: float,
    min_size: float,
    weights: Sequence[float],
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fpn_kernels.select_candidates`, without a word to the host."""
    n, r = proposals.shape[:2]
    device, k = proposals.device, class_logits.shape[1] - 1
    boxes = torch.empty(n, capacity, 4, dtype=torch.float32, device=device)
    out_scores = torch.empty(n, capacity, dtype=torch.float32, device=device)
    labels = torch.empty(n, capacity, dtype=torch.int64, device=device)
    filled = torch.empty(n, dtype=torch.int64, device=device)
    if n * r == 0:
        return boxes.zero_(), out_scores.fill_(-torch.inf), labels.fill_(1), filled.zero_()
    class_logits = class_logits if class_logits.stride(1) == 1 else class_logits.contiguous()
    box_deltas = box_deltas if box_deltas.stride(1) == 1 else box_deltas.contiguous()
    scores = torch.empty(n, r, k, dtype=torch.float32, device=device)
    roi_counts = torch.empty(n, r, dtype=torch.int32, device=device)
    classes = triton.next_power_of_2(k + 1)
    rows = max(TILE // classes, 1)
    grid = triton.cdiv(r, rows), n
    tile = {"ROWS": rows, "CLASSES": classes, "num_warps": 4, "enable_fp_fusion": False}

    score_candidates_kernel[grid](
        class_logits, counts.contiguous(), scores, roi_counts, class_logits.stride(0), r, float(score_thresh),
        K=k, **tile,
    )  # fmt: skip
    place_candidates_kernel[grid](
        scores, roi_counts, box_deltas, proposals.contiguous(), image_sizes.contiguous(), boxes, out_scores, labels,
        filled, box_deltas.stride(0), r, capacity, float(min_size), *map(float, weights),
        K=k, LOG_SIZE_LIMIT=LOG_SIZE_LIMIT, SUMMED=SUMMED, **tile,
    )  # fmt: skip
    return boxes, out_scores, labels, filled


def _builds() -> Iterator[Build]:
    """91 classes, background included."""
    tile = {"K": 90, "ROWS": TILE // 128, "CLASSES": 128}
    shared = {"scores": "*fp32", "roi_counts": "*i32"}
    for dtype in ("fp16", "fp32"):
        yield Build(
            kernel=score_candidates_kernel,
            variant=dtype,
            signature={
                "class_logits": f"*{dtype}", "counts": "*i64", **shared, "row_stride": "i32", "R": "i32",
                "threshold": "fp32",
            },
            constants=tile,
        )  # fmt: skip
        yield Build(
            kernel=place_candidates_kernel,
            variant=dtype,
            signature={
                **shared, "box_deltas": f"*{dtype}", "proposals": "*fp32", "image_sizes": "*i64", "boxes": "*fp32",
                "out_scores": "*fp32", "labels": "*i64", "filled": "*i64", "row_stride": "i32", "R": "i32",
                "capacity": "i32", "min_size": "fp32", "weight_x": "fp32", "weight_y": "fp32", "weight_w": "fp32",
                "weight_h": "fp32",
            },
            constants={**tile, "LOG_SIZE_LIMIT": LOG_SIZE_LIMIT, "SUMMED": SUMMED},
        )  # fmt: skip


BUILDS = tuple(_builds())
