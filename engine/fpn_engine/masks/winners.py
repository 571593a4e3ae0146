"""The best places of all levels and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpn_kernels import select_topk, stable_topk


class Winners(NamedTuple):
    """The best places of a batch.

    Attributes: logits: (N, K) float32, descending. heads: (N, K) int64. places: (N, K, 4) int64: image, position of the
        level, y, x.
    """

    logits: Tensor
    heads: Tensor
    places: Tensor


def select_winners(scores: Sequence[Tensor], k: int) -> Winners:
    """The ``k`` best of all levels, locations and heads of each image; ties by lower level, y, x, head.

    Args: scores: logits of each level, (N, A, H_l, W_l). NaN ranks last.
    """
    logits, indices, levels = select_topk(scores, k)
    best = stable_topk(logits, min(k, logits.shape[1]))
    index, level = indices.gather(1, best), levels[best]
    n, heads = scores[0].shape[:2]
    # Filled on the device: a table of host values would have to be copied there, which no graph can record.
    widths = torch.cat([level.new_full((1,), part.shape[3]) for part in scores])[level]
    cell = index // heads
    image = torch.arange(n, device=index.device)[:, None].expand_as(cell)
    places = torch.stack([image, level, cell // widths, cell % widths], dim=2)
    return Winners(logits.gather(1, best), index % heads, places)
