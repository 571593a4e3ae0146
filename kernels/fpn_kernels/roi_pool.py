"""Multi-level RoIPool (Girshick 2015, sec. 2.1; levels by Lin et al. 2017, sec. 4.2, eq. 1).

The rounding is that of Caffe's layer and of ``torchvision.ops.roi_pool``: corners to whole cells, half away from
zero, the last one included; bins by floor and ceiling, so that neighbours may share cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.levels import check_pooling, number_boxes, pool_by_level, split_by_level
from fpn_kernels.registration import Op

CELLS = 1 << 22  # cells of bins laid out at a time: about 100 MB of temporaries


def _round_half_away(x: Tensor) -> Tensor:
    """C's ``round``; ``torch.round`` takes halves to even, and x + 0.5 rounds up just below a half."""
    whole = x.trunc()
    return whole + x.sign() * ((x - whole).abs() >= 0.5)


def _bin_edges(first: Tensor, last: Tensor, bins: int, length: int) -> tuple[Tensor, Tensor]:
    """Bins along one axis of RoIs from cell ``first`` to ``last``: (R, bins) int64 begins and ends, cut to the map."""
    bin_size = ((last - first + 1).clamp(min=1) / bins)[:, None]
    step = torch.arange(bins, dtype=torch.float32, device=first.device)
    begin = (step * bin_size).floor() + first[:, None]
    end = ((step + 1) * bin_size).ceil() + first[:, None]
    return begin.clamp(0, length).to(torch.int64), end.clamp(0, length).to(torch.int64)


def _cells_of_bins(
    shape: tuple[int, int], rois: Tensor, output_size: int, stride: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of a (N * H * W, C) table that each bin covers, of (R, 5) finite RoIs in pixels, about CELLS at a time.

    Yields: a slice of the R * S * S bins, the rows of them all, and where each one's begin.
    """
    h, w = shape
    # A finite coordinate far outside reads nothing; the limit keeps sums of it exact.
    corners = _round_half_away((rois[:, 1:] * (1.0 / stride)).clamp(-1e6, 1e6))
    y_begin, y_end = _bin_edges(corners[:, 1], corners[:, 3], output_size, h)
    x_begin, x_end = _bin_edges(corners[:, 0], corners[:, 2], output_size, w)
    rows, columns = (y_end - y_begin).clamp(min=0), (x_end - x_begin).clamp(min=0)
    cells = (rows[:, :, None] * columns[:, None, :]).flatten()  # of each bin
    width = columns[:, None, :].expand(-1, output_size, -1).flatten()
    corner = (rois[:, 0].to(torch.int64)[:, None] * h + y_begin)[:, :, None] * w + x_begin[:, None, :]
    for bags in _split(cells):
        bag = torch.arange(bags.start, bags.stop, device=cells.device).repeat_interleave(cells[bags])
        offsets = cells[bags].cumsum(0) - cells[bags]
        within = torch.arange(len(bag), device=cells.device) - offsets.repeat_interleave(cells[bags])
        yield bags, corner.flatten()[bag] + within // width[bag] * w + within % width[bag], offsets


def _pool_level(features: Tensor, rois: Tensor, output_size: int, stride: float) -> Tensor:
    """RoIPool of (R, 5) finite RoIs in pixels on one (N, C, H, W) level: (R, S, S, C).

    Each bin is the maximum of some rows of a (N * H * W, C) table, so an embedding bag does the work and autograd's
    backward: the gradient goes to the first of equal maxima, as in torchvision.
    """
    _, c, h, w = features.shape
    table = features.permute(0, 2, 3, 1).reshape(-1, c).contiguous()
    pooled = [
        F.embedding_bag(index, table, offsets, mode="max")  # an empty bin is 0
        for _, index, offsets in _cells_of_bins((h, w), rois, output_size, stride)
    ]
    return torch.cat(pooled).view(len(rois), output_size, output_size, c)


def _pull_level(gradient: Tensor, features: Tensor, rois: Tensor, stride: float) -> Tensor:
    """Gradient of one level, (N, H, W, C), from that of what RoIs pooled there, (R, S, S, C)."""
    n, c, h, w = features.shape
    table = features.permute(0, 2, 3, 1).reshape(-1, c).contiguous()
    pulled = torch.zeros_like(table, dtype=torch.float32)
    bins = gradient.reshape(-1, c).to(torch.float32)
    for bags, index, offsets in _cells_of_bins((h, w), rois, gradient.shape[1], stride):
        sizes = torch.cat([offsets[1:], offsets.new_tensor([len(index)])]) - offsets
        first = torch.embedding_bag(table, index, offsets, mode=2)[3]  # mode max: which row each maximum is
        pulled.scatter_add_(0, first, bins[bags] * (sizes > 0)[:, None])
    return pulled.view(n, h, w, c)


def _split(cells: Tensor) -> list[slice]:
    """Slices of the bins that hold about CELLS cells each."""
    part = cells.cumsum(0) // CELLS
    edges = [0, *(1 + (part[1:] != part[:-1]).nonzero()[:, 0]).tolist(), len(cells)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def multilevel_roi_pool_reference(
    features: Sequence[Tensor],
    rois: Tensor,
    counts: Tensor | None,
    output_size: int,
    strides: Sequence[float],
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> Tensor:
    def pool_level(feature: Tensor, chosen: Tensor, stride: float) -> Tensor:
        return _pool_level(feature, chosen, output_size, stride)

    return pool_by_level(
        pool_level, features, rois, counts, output_size, strides, min_level, canonical_level, canonical_size
    )


def multilevel_roi_pool_backward_reference(
    gradient: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    counts: Tensor | None,
    strides: Sequence[float],
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> list[Tensor]:
    gradient = gradient.permute(0, 2, 3, 1).contiguous()
    n = len(features[0])
    chosen_by_level = split_by_level(n, len(features), rois, counts, min_level, canonical_level, canonical_size)
    tables = [
        _pull_level(gradient[chosen], feature, rois[chosen], stride)
        for chosen, feature, stride in zip(chosen_by_level, features, strides, strict=True)
    ]
    return [table.to(gradient.dtype).permute(0, 3, 1, 2) for table in tables]


def _fake(features: Sequence[Tensor], rois: Tensor, counts: Tensor | None, output_size: int, *form: Any) -> Tensor:
    return features[0].new_empty(rois.shape[0], output_size, output_size, features[0].shape[1]).permute(0, 3, 1, 2)


def _backward_fake(gradient: Tensor, features: Sequence[Tensor], *form: Any) -> list[Tensor]:
    sizes = [(n, h, w, c) for n, c, h, w in (level.shape for level in features)]
    return [gradient.new_empty(size).permute(0, 3, 1, 2) for size in sizes]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, counts, _, *ctx.form = inputs
    ctx.save_for_backward(rois, counts, *features)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    rois, counts, *features = ctx.saved_tensors
    return _roi_pool_backward.dispatch(gradient, features, rois, counts, *ctx.form), *[None] * 7


FORM = "float[] strides, int min_level, int canonical_level, float canonical_size"
_roi_pool = Op(
    "multilevel_roi_pool",
    f"(Tensor[] features, Tensor rois, Tensor? counts, int output_size, {FORM}) -> Tensor",
    multilevel_roi_pool_reference,
    "fpn_kernels.triton.roi_pool:launch_multilevel_roi_pool",
    _fake,
    backward=_backward,
    save=_save,
)
_roi_pool_backward = Op(
    "multilevel_roi_pool_backward",
    f"(Tensor gradient, Tensor[] features, Tensor rois, Tensor? counts, {FORM}) -> Tensor[]",
    multilevel_roi_pool_backward_reference,
    "fpn_kernels.triton.roi_pool:launch_multilevel_roi_pool_backward",
    _backward_fake,
)


def multilevel_roi_pool(
    features: Sequence[Tensor],
    rois: Tensor,
    counts: Tensor | None = None,
    *,
    output_size: int = 7,
    strides: Sequence[float] = (4, 8, 16, 32),
    min_level: int = 2,
    canonical_level: int = 4,
    canonical_size: float = 224,
) -> Tensor:
    """RoIPool where each RoI is pooled from the level that eq. 1 assigns it to.

    A RoI covers the cells round(x1 / stride)..round(x2 / stride), at least one, halves away from zero. Bin i of S
    covers those from floor(i * size / S) up to ceil((i + 1) * size / S), computed in float32; its value is their
    maximum, 0 if none lies in the map. Differentiable in ``features``.

    Args:
        features: levels finest first, each (N, C, H_l, W_l), free of NaN; fp32, fp16 or bf16.
        rois: (R, 5) float32, batch index and x1 y1 x2 y2 in pixels of the network's input.
        counts: (N,) int64 or None. If given, rois hold R / N slots per image, image by image, of which only the first
            counts[n] are pooled; the others give zeros.
        output_size: S, bins per side. strides: pixels per cell of each level.
        min_level, canonical_level, canonical_size: level of features[0] and the constants of eq. 1.
    Returns: (R, C, output_size, output_size) in channels_last order, dtype of ``features``; RoIs with a non-finite
        coordinate give zeros.
    Raises: ValueError if shape or dtype differ from the above, or (on the CPU) for a batch index outside the batch;
        kernels mask such RoIs.
    """
    check_pooling(features, rois, counts, output_size, strides)
    form = (list(strides), min_level, canonical_level, canonical_size)
    return _roi_pool(rois.device, list(features), rois, counts, output_size, *form)


def roi_pool(input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int, spatial_scale: float = 1.0) -> Tensor:
    """RoIPool on one feature map; ``torchvision.ops.roi_pool``'s form, with square output.

    Args:
        input: (N, C, H, W). boxes: (R, 5) float32 with batch index, or one (R_n, 4) tensor per image.
        spatial_scale: cells per pixel.
    Returns: (R, C, output_size, output_size).
    """
    return multilevel_roi_pool(
        [input], number_boxes(input, boxes), output_size=output_size, strides=[1.0 / spatial_scale]
    )
