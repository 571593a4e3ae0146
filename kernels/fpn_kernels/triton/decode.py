"""Proposals from selected anchors, all levels in one launch; an anchor is computed where it is needed.

Rounded as the reference is, but for exp: ``exponential`` is within 1 ulp and PyTorch's within 1 or 2, by device. Scores
are therefore within 3 ulp of the reference's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.decode import LOG_SIZE_LIMIT
from fpn_kernels.selection import level_slots
from fpn_kernels.triton.boxes import clip_box, decode_box, exponential, store_box
from fpn_kernels.triton.builds import Build
from fpn_kernels.triton.levels import Maps, count_blocks, find_level, pack_sizes, pick_pointer, pick_size, sum_sizes

BLOCK = 64  # slots per program: one wave of programs at batch 1, two warps each


@triton.jit
def decode_proposals_kernel(
    logits, indices, deltas, image_strides, channel_strides, cell_strides, slots, widths, x_strides, y_strides,
    base_anchors, image_sizes, boxes, scores, min_size, score_thresh,
    A: tl.constexpr, LOG_SIZE_LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of all levels' slots, N). ``widths``: cells per row; ``x_strides``, ``y_strides``: pixels per cell.

    ``deltas``: each level's (N, 4A, H, W).
    """
    image = tl.program_id(1).to(tl.int64)
    level, block = find_level(tl.program_id(0), slots, BLOCK)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    inside = slot < pick_size(slots, level)
    at = image * sum_sizes(slots, len(slots)) + sum_sizes(slots, level) + slot
    index = tl.load(indices + at, mask=inside, other=0).to(tl.int32)
    logit = tl.load(logits + at, mask=inside, other=0.0)

    anchor, cell = index % A, index // A
    width = pick_size(widths, level)
    x = (cell % width * pick_size(x_strides, level)).to(tl.float32)
    y = (cell // width * pick_size(y_strides, level)).to(tl.float32)
    base = base_anchors + (level * A + anchor) * 4
    step = pick_size(channel_strides, level).to(tl.int64)
    delta = pick_pointer(deltas, level) + image * pick_size(image_strides, level)
    delta += 4 * anchor * step + cell * pick_size(cell_strides, level).to(tl.int64)
    x1, y1, x2, y2 = decode_box(
        x + tl.load(base, mask=inside, other=0.0),
        y + tl.load(base + 1, mask=inside, other=0.0),
        x + tl.load(base + 2, mask=inside, other=0.0),
        y + tl.load(base + 3, mask=inside, other=0.0),
        tl.load(delta, mask=inside, other=0.0).to(tl.float32),
        tl.load(delta + step, mask=inside, other=0.0).to(tl.float32),
        tl.load(delta + 2 * step, mask=inside, other=0.0).to(tl.float32),
        tl.load(delta + 3 * step, mask=inside, other=0.0).to(tl.float32),
        LOG_SIZE_LIMIT,
    )
    x1, y1, x2, y2 = clip_box(x1, y1, x2, y2, image_sizes, image)
    score = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), 1.0 + exponential(-logit))
    keep = (x2 - x1 >= min_size) & (y2 - y1 >= min_size) & (score >= score_thresh)
    store_box(
        boxes, at, tl.where(keep, x1, 0.0), tl.where(keep, y1, 0.0), tl.where(keep, x2, 0.0), tl.where(keep, y2, 0.0),
        inside,
    )  # fmt: skip
    tl.store(scores + at, tl.where(keep, score, float("-inf")), mask=inside)


def launch_decode_proposals(
    logits: Tensor,
    indices: Tensor,
    deltas: Sequence[Tensor],
    base_anchors: Tensor,
    padded_size: Sequence[int],
    image_sizes: Tensor,
    k: int,
    min_size: float,
    score_thresh: float,
) -> tuple[Tensor, Tensor]:
    """As :func:`fpn_kernels.decode_proposals`, without a word to the host."""
    n, total = logits.shape
    boxes, scores = logits.new_empty(n, total, 4), torch.empty_like(logits, memory_format=torch.contiguous_format)
    if n * total == 0:
        return boxes, scores
    a = base_anchors.shape[1]
    cells = [level.shape[2:] for level in deltas]
    slots = level_slots([a * h * w for h, w in cells], k)
    maps = Maps(deltas)
    decode_proposals_kernel[(count_blocks(slots, BLOCK), n)](
        logits.contiguous(), indices.contiguous(), maps.pointers, *maps.strides, pack_sizes(slots),
        pack_sizes(w for _, w in cells), pack_sizes(padded_size[1] // max(w, 1) for _, w in cells),
        pack_sizes(padded_size[0] // max(h, 1) for h, _ in cells), base_anchors.to(torch.float32).contiguous(),
        image_sizes.contiguous(), boxes, scores, float(min_size), float(score_thresh),
        A=a, LOG_SIZE_LIMIT=LOG_SIZE_LIMIT, BLOCK=BLOCK, num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
    return boxes, scores


def _builds() -> Iterator[Build]:
    five = ("i32",) * 5
    for dtype in ("fp16", "fp32"):
        yield Build(
            kernel=decode_proposals_kernel,
            variant=dtype,
            signature={
                "logits": "*fp32", "indices": "*i64", "deltas": (f"*{dtype}",) * 5, "image_strides": five,
                "channel_strides": five, "cell_strides": five, "slots": five, "widths": five, "x_strides": five,
                "y_strides": five, "base_anchors": "*fp32", "image_sizes": "*i64", "boxes": "*fp32", "scores": "*fp32",
                "min_size": "fp32", "score_thresh": "fp32",
            },
            constants={"A": 3, "LOG_SIZE_LIMIT": LOG_SIZE_LIMIT, "BLOCK": BLOCK},
            num_warps=2,
        )  # fmt: skip


BUILDS = tuple(_builds())
