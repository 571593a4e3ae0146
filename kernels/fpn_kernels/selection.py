"""Select: the k best anchors of every pyramid level by objectness (Lin et al. 2017, sec. 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels.checks import FLOATS, require, require_device, require_dtype, require_shape
from fpn_kernels.registration import Op

_LOW_32_BITS = (1 << 32) - 1


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, best first, ties by lower index.

    The same on every device and for every k, unlike ``torch.topk``, which leaves ties open: score and index
    are packed into one 64-bit key, so that no two keys are equal. NaN ranks below everything, -inf included.

    Args:
        scores: (N, M) float32; k: at most M, and M below 2^32.
    Returns: (N, k) int64.
    Raises: ValueError if shape, dtype or k differ from the above.
    """
    require_shape("scores", scores, None, None)
    require_dtype("scores", scores, torch.float32)
    require(0 <= k <= scores.shape[1], "k must be from 0 to {}, not {}", scores.shape[1], k)
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 tie with 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)  # IEEE order as integer order
    ordered = ordered.masked_fill(scores.isnan(), -1 << 31)
    index = torch.arange(scores.shape[1], device=scores.device)
    keys = (ordered << 32) + (_LOW_32_BITS - index)
    return _LOW_32_BITS - (keys.topk(k, dim=1).values & _LOW_32_BITS)


def flatten_anchors(level: Tensor, num_anchors: int) -> Tensor:
    """(N, A * D, H, W) to (N, H * W * A, D): the order (y, x, anchor); a view if channels_last."""
    n, channels, h, w = level.shape
    return level.permute(0, 2, 3, 1).reshape(n, h * w * num_anchors, channels // num_anchors)


def level_slots(sizes: Sequence[int], k: int) -> list[int]:
    """How many slots each level has in the selection: min(k, anchors of the level)."""
    return [min(k, size) for size in sizes]


def select_topk_reference(objectness: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits, indices, levels = [], [], []
    for level, scores in enumerate(objectness):
        flat = flatten_anchors(scores, scores.shape[1])[..., 0].to(torch.float32)
        best = stable_topk(flat, min(k, flat.shape[1]))
        logits.append(flat.gather(1, best))
        indices.append(best)
        levels.append(best.new_full(best.shape[1:], level))
    return torch.cat(logits, dim=1), torch.cat(indices, dim=1), torch.cat(levels)


def _fake(objectness: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    first = objectness[0]
    n = first.shape[0]
    slots = sum(level_slots([level.shape[1] * level.shape[2] * level.shape[3] for level in objectness], k))
    indices = first.new_empty(n, slots, dtype=torch.int64)
    return first.new_empty(n, slots, dtype=torch.float32), indices, first.new_empty(slots, dtype=torch.int64)


_select_topk = Op(
    "select_topk",
    "(Tensor[] objectness, int k) -> (Tensor, Tensor, Tensor)",
    select_topk_reference,
    "fpn_kernels.triton.selection:launch_select_topk",
    _fake,
)


def select_topk(objectness: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k anchors of highest objectness on each level of each image.

    Slots: level by level, finest first, min(k, A H_l W_l) each, so their number K follows from the shapes alone.
    Within a level by descending logit, ties by lower anchor index; NaN ranks last.

    Args:
        objectness: logits of each level, finest first, each (N, A, H_l, W_l); fp32, fp16 or bf16.
        k: most anchors to keep per level and image.
    Returns:
        logits (N, K) float32; indices (N, K) int64 into the level's anchors in the order (y, x, anchor);
        levels (K,) int64, the position in ``objectness`` of each slot's level.
    Raises: ValueError if shape, dtype or k differ from the above.
    """
    require(len(objectness) >= 1, "objectness must hold at least one level")
    require(k >= 1, "k must be at least 1, not {}", k)
    n, a = objectness[0].shape[:2]
    for level in objectness:
        require_shape("objectness", level, n, a, None, None)
        require_dtype("objectness", level, *FLOATS)
    require_device(**{f"objectness[{i}]": level for i, level in enumerate(objectness)})
    return _select_topk(objectness[0].device, list(objectness), k)
