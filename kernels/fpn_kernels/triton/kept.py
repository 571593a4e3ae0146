"""What NMS kept, gathered in one launch, zeros behind the last."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fpn_kernels.triton.builds import Build

BLOCK = 32  # slots per program, one warp: the time is that of two loads, one after the other


@triton.jit(do_not_specialize=["K", "D"])
def take_kernel(
    keep, boxes, scores, labels, out_boxes, out_scores, out_labels, rois, K, D,
    HAS_LABELS: tl.constexpr, HAS_ROIS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(D / BLOCK), N). ``out_*``: (N, D), zeros where ``keep`` is -1; ``rois``: (N * D, 5)."""
    image = tl.program_id(1).to(tl.int64)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < D
    to = image * D + slots
    index = tl.load(keep + to, mask=inside, other=-1)
    taken = index >= 0
    at = image * K + index
    side = tl.arange(0, 4)[None, :]
    box = tl.load(boxes + 4 * at[:, None] + side, mask=taken[:, None], other=0.0)
    tl.store(out_boxes + 4 * to[:, None] + side, box, mask=inside[:, None])
    tl.store(out_scores + to, tl.load(scores + at, mask=taken, other=0.0), mask=inside)
    if HAS_LABELS:
        tl.store(out_labels + to, tl.load(labels + at, mask=taken, other=0), mask=inside)
    if HAS_ROIS:
        tl.store(rois + 5 * to, tl.zeros([BLOCK], tl.float32) + image.to(tl.float32), mask=inside)
        tl.store(rois + 5 * to[:, None] + 1 + side, box, mask=inside[:, None])


def launch_take_proposals(keep: Tensor, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fpn_kernels.take_proposals`, in one launch."""
    rois = boxes.new_empty(keep.numel(), 5)
    out_boxes, out_scores = _launch(keep, boxes, scores, None, None, rois)
    return out_boxes, out_scores, rois


def launch_take_detections(
    keep: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fpn_kernels.take_detections`, in one launch."""
    out_labels = labels.new_empty(keep.shape)
    out_boxes, out_scores = _launch(keep, boxes, scores, labels.contiguous(), out_labels, None)
    return out_boxes, out_scores, out_labels


def _launch(
    keep: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor | None, out_labels: Tensor | None, rois: Tensor | None
) -> tuple[Tensor, Tensor]:
    (n, d), k = keep.shape, scores.shape[1]
    out_boxes, out_scores = boxes.new_empty(n, d, 4), scores.new_empty(n, d)
    if n * d > 0:
        take_kernel[(triton.cdiv(d, BLOCK), n)](
            keep.contiguous(), boxes.contiguous(), scores.contiguous(), labels, out_boxes, out_scores, out_labels, rois,
            k, d, HAS_LABELS=labels is not None, HAS_ROIS=rois is not None, BLOCK=BLOCK, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out_boxes, out_scores


def _build(variant: str, **outputs: str) -> Build:
    return Build(
        kernel=take_kernel,
        variant=variant,
        signature={
            "keep": "*i64", "boxes": "*fp32", "scores": "*fp32", "out_boxes": "*fp32", "out_scores": "*fp32", **outputs,
            "K": "i32", "D": "i32",
        },
        constants={
            "HAS_LABELS": "labels" in outputs, "HAS_ROIS": "rois" in outputs, "BLOCK": BLOCK,
            **{name: None for name in ("labels", "out_labels", "rois") if name not in outputs},
        },
        num_warps=1,
    )  # fmt: skip


BUILDS = (_build("proposals", rois="*fp32"), _build("detections", labels="*i64", out_labels="*i64"))
