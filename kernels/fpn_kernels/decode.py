"""Anchors and box decoding (Lin et al. 2017, sec. 4.1; Ren et al. 2015, eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels.checks import FLOATS, require, require_device, require_dtype, require_shape
from fpn_kernels.registration import Op
from fpn_kernels.selection import flatten_anchors, level_slots

# exp(dw) is limited to 1000 / 16: a 16-pixel anchor cannot grow past 1000 pixels.
LOG_SIZE_LIMIT = math.log(1000.0 / 16)


def make_base_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """The anchors of one location, centred at (0, 0): areas sizes^2, ratio h / w, sides rounded half to even.

    Args: sizes in pixels and aspect_ratios, both of one level.
    Returns: (len(aspect_ratios) * len(sizes), 4) float32, ratio-major as torchvision orders them.
    """
    scales = torch.tensor(sizes, dtype=torch.float32)
    h_ratios = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()
    w = ((1 / h_ratios)[:, None] * scales).reshape(-1)
    h = (h_ratios[:, None] * scales).reshape(-1)
    return (torch.stack([-w, -h, w, h], dim=1) / 2).round()


def decode_boxes(anchors: Tensor, deltas: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Apply (dx, dy, dw, dh) / weights to boxes: centre + d * side, side * exp(min(d, log(1000 / 16))).

    Args: anchors, deltas: (..., 4) float32, x1 y1 x2 y2 in pixels and regression output.
    Returns: (..., 4) float32, not clipped.
    """
    w, h = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    cx, cy = anchors[..., 0] + 0.5 * w, anchors[..., 1] + 0.5 * h
    wx, wy, ww, wh = weights
    cx, cy = deltas[..., 0] / wx * w + cx, deltas[..., 1] / wy * h + cy
    half_w = 0.5 * ((deltas[..., 2] / ww).clamp(max=LOG_SIZE_LIMIT).exp() * w)
    half_h = 0.5 * ((deltas[..., 3] / wh).clamp(max=LOG_SIZE_LIMIT).exp() * h)
    return torch.stack([cx - half_w, cy - half_h, cx + half_w, cy + half_h], dim=-1)


def clip_boxes(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Clip boxes to their images.

    Args: boxes (N, K, 4) in pixels; image_sizes (N, 2), height and width in pixels.
    Returns: (N, K, 4), same dtype as ``boxes``.
    """
    h, w = image_sizes.to(boxes.dtype)[:, None].unbind(dim=-1)
    limits = torch.stack([w, h, w, h], dim=-1)
    return boxes.clamp(min=0).minimum(limits)


def large_enough(boxes: Tensor, min_size: float) -> Tensor:
    """Which (..., 4) boxes have both sides of at least ``min_size`` pixels; NaN is never large enough."""
    return (boxes[..., 2:] - boxes[..., :2] >= min_size).all(dim=-1)


def decode_proposals_reference(
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
    num_anchors = base_anchors.shape[1]
    sizes = [num_anchors * level.shape[2] * level.shape[3] for level in deltas]
    boxes = []
    for index, level, base in zip(indices.split(level_slots(sizes, k), dim=1), deltas, base_anchors, strict=True):
        h, w = level.shape[-2:]
        cell, anchor = index // num_anchors, index % num_anchors
        x, y = cell % w * (padded_size[1] // w), cell // w * (padded_size[0] // h)
        anchors = torch.stack([x, y, x, y], dim=-1) + base[anchor]
        chosen = flatten_anchors(level, num_anchors).gather(1, index[..., None].expand(-1, -1, 4))
        boxes.append(decode_boxes(anchors, chosen.to(torch.float32)))
    clipped = clip_boxes(torch.cat(boxes, dim=1), image_sizes)
    # Not torch.sigmoid, which on the CPU rounds by position in the tensor: ties have to stay ties in any batch.
    scores = 1 / (1 + (-logits).exp())
    keep = large_enough(clipped, min_size) & (scores >= score_thresh)
    return torch.where(keep[..., None], clipped, 0.0), torch.where(keep, scores, -torch.inf)


def _fake(
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
    return logits.new_empty(*logits.shape, 4), logits.new_empty(logits.shape)


_decode_proposals = Op(
    "decode_proposals",
    "(Tensor logits, Tensor indices, Tensor[] deltas, Tensor base_anchors, SymInt[] padded_size, Tensor image_sizes, "
    "int k, float min_size, float score_thresh) -> (Tensor, Tensor)",
    decode_proposals_reference,
    "fpn_kernels.triton.decode:launch_decode_proposals",
    _fake,
)


def decode_proposals(
    logits: Tensor,
    indices: Tensor,
    deltas: Sequence[Tensor],
    base_anchors: Tensor,
    padded_size: tuple[int, int],
    image_sizes: Tensor,
    *,
    k: int,
    min_size: float = 1e-3,
    score_thresh: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Boxes and scores of selected anchors; anchors are computed from their index, never stored.

    Anchor (y, x, a) of a level of (H_l, W_l) cells lies at base_anchors[l, a] + (x sx, y sy), with strides
    s = padded side // cells per axis and no half-cell offset. The box is decoded, clipped to the image and dropped
    if a side is below ``min_size``, its score below ``score_thresh``, or anything about it is NaN.

    Args:
        logits (N, K) float32, indices (N, K) int64: from :func:`select_topk` with the same ``k``.
        deltas: each level, finest first, (N, 4A, H_l, W_l), channel 4 a + i; fp32, fp16 or bf16.
        base_anchors: (L, A, 4) float32, see :func:`make_base_anchors`.
        padded_size: height and width of the padded batch in pixels.
        image_sizes: (N, 2) int64, resized height and width of each image.
    Returns:
        boxes (N, K, 4) float32 in pixels of the resized image, 0 where dropped;
        scores (N, K) float32, sigmoid(logits), -inf where dropped.
    Raises: ValueError if shape or dtype differ from the above.
    """
    require_shape("logits", logits, None, None)
    n, slots = logits.shape
    require(len(deltas) >= 1, "deltas must hold at least one level")
    require_shape("indices", indices, n, slots)
    require_shape("base_anchors", base_anchors, len(deltas), None, 4)
    require_shape("image_sizes", image_sizes, n, 2)
    require_dtype("logits", logits, torch.float32)
    require_dtype("indices", indices, torch.int64)
    require_dtype("image_sizes", image_sizes, torch.int64)
    a = base_anchors.shape[1]
    for level in deltas:
        require_shape("deltas", level, n, 4 * a, None, None)
        require_dtype("deltas", level, *FLOATS)
    total = sum(level_slots([a * level.shape[2] * level.shape[3] for level in deltas], k))
    require(total == slots, "logits must have {} slots for these deltas and k={}, not {}", total, k, slots)
    levels = {f"deltas[{i}]": level for i, level in enumerate(deltas)}
    require_device(logits=logits, indices=indices, **levels, base_anchors=base_anchors, image_sizes=image_sizes)
    return _decode_proposals(
        logits.device,
        logits,
        indices,
        list(deltas),
        base_anchors,
        list(padded_size),
        image_sizes,
        k,
        float(min_size),
        float(score_thresh),
    )
