"""Multi-level RoIAlign (Lin et al. 2017, sec. 4.2; He et al. 2017, sec. 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.checks import require
from fpn_kernels.levels import check_pooling, number_boxes, pool_by_level, split_by_level
from fpn_kernels.registration import Op

# Adaptive sampling takes ceil(RoI side / output_size) samples per bin and axis; a box far larger than any image would
# ask for unbounded work, so the grid stops here: enough for a RoI of 128 * 7 = 896 cells, 3584 pixels on P2.
MAX_GRID = 128
TAPS = 1 << 22  # bilinear taps of adaptively sampled RoIs laid out at a time: about 100 MB of temporaries


def _axis_taps(start: Tensor, size: Tensor, bins: int, grid: int, length: int) -> tuple[Tensor, Tensor]:
    """Bilinear taps along one axis: (R, bins, 2 grid) cell indices and weights; outside [-1, length] weighs 0."""
    step = torch.arange(bins * grid, dtype=torch.float32, device=start.device).view(1, bins, grid)
    sample = torch.div(step, grid, rounding_mode="floor")  # the bin
    bin_size = (size / bins)[:, None, None]
    position = start[:, None, None] + sample * bin_size + (step - sample * grid + 0.5) * bin_size / grid
    inside = ((position >= -1) & (position <= length)).to(torch.float32)
    position = position.clamp(0, length - 1)
    low = position.floor().clamp(max=max(length - 2, 0))
    high_weight = (position - low) * inside
    low = low.to(torch.int32)
    index = torch.stack([low, (low + 1).clamp(max=length - 1)], dim=-1)
    weight = torch.stack([inside - high_weight, high_weight], dim=-1)
    return index.flatten(2), weight.flatten(2)


def _taps(
    image_shape: tuple[int, int], rois: Tensor, output_size: int, grid: tuple[int, int], aligned: bool
) -> tuple[Tensor, Tensor]:
    """Rows of a (N * H * W, C) table whose weighted sum each bin is, of RoIs in cells, (R, 5).

    Returns: index and weight, both (R * S * S, 4 * grid^2).
    """
    h, w = image_shape
    sides = rois[:, 3:] - rois[:, 1:3]
    if not aligned:
        sides = sides.clamp(min=1)
    y_index, y_weight = _axis_taps(rois[:, 2], sides[:, 1], output_size, grid[0], h)
    x_index, x_weight = _axis_taps(rois[:, 1], sides[:, 0], output_size, grid[1], w)
    rows = rois[:, 0].to(torch.int32)[:, None, None] * h + y_index
    index = rows[:, :, None, :, None] * w + x_index[:, None, :, None, :]
    weight = (y_weight / (grid[0] * grid[1]))[:, :, None, :, None] * x_weight[:, None, :, None, :]
    bags = (len(rois) * output_size**2, 4 * grid[0] * grid[1])
    return index.reshape(bags), weight.reshape(bags)


def _to_cells(rois: Tensor, stride: float, aligned: bool) -> Tensor:
    cells = rois * torch.tensor([1.0] + [1.0 / stride] * 4, device=rois.device)
    # A finite coordinate far outside reads nothing; the limit keeps sums of it finite too.
    cells[:, 1:] = cells[:, 1:].clamp(-1e6, 1e6) - (0.5 if aligned else 0.0)
    return cells


def _share_grids(
    cells: Tensor, output_size: int, sampling_ratio: int, aligned: bool
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Which RoIs in cells take the same samples per bin, (by height, by width); those without a sample are left out."""
    if sampling_ratio > 0:
        yield torch.arange(len(cells), device=cells.device), (sampling_ratio, sampling_ratio)
        return
    sides = cells[:, 3:] - cells[:, 1:3]
    if not aligned:
        sides = sides.clamp(min=1)
    grids = (sides / output_size).ceil().clamp(0, MAX_GRID).to(torch.int64)
    for grid_w, grid_h in grids[grids.amin(dim=1) > 0].unique(dim=0).tolist():
        chosen = ((grids[:, 0] == grid_w) & (grids[:, 1] == grid_h)).nonzero()[:, 0]
        for part in chosen.split(max(1, TAPS // (4 * grid_w * grid_h * output_size**2))):
            yield part, (grid_h, grid_w)


def _pool_level(
    features: Tensor, rois: Tensor, output_size: int, stride: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign of (R, 5) finite RoIs in pixels on one (N, C, H, W) level: (R, S, S, C).

    An embedding bag does the work and autograd's backward.
    """
    _, c, h, w = features.shape
    # Contiguous even where one image's reshape is a view: other layouts take a slower path of other rounding.
    table = features.permute(0, 2, 3, 1).reshape(-1, c).contiguous()
    cells = _to_cells(rois, stride, aligned)

    def pool(some: Tensor, grid: tuple[int, int]) -> Tensor:
        index, weight = _taps((h, w), some, output_size, grid, aligned)
        pooled = F.embedding_bag(index, table, mode="sum", per_sample_weights=weight.to(table.dtype))
        return pooled.view(-1, output_size, output_size, c)

    if sampling_ratio > 0:
        return pool(cells, (sampling_ratio, sampling_ratio))
    out = features.new_zeros(len(rois), output_size, output_size, c)
    for part, grid in _share_grids(cells, output_size, sampling_ratio, aligned):
        out.index_copy_(0, part, pool(cells[part], grid))
    return out


def _pull_level(
    gradient: Tensor, rois: Tensor, shape: tuple[int, int, int], stride: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Gradient of one level, (N, H, W, C) of ``shape``'s N, H, W, from that of what RoIs pooled there, (R, S, S, C)."""
    n, h, w = shape
    output_size, c = gradient.shape[2:]
    table = gradient.new_zeros(n * h * w, c, dtype=torch.float32)
    cells = _to_cells(rois, stride, aligned)
    for part, grid in _share_grids(cells, output_size, sampling_ratio, aligned):
        index, weight = _taps((h, w), cells[part], output_size, grid, aligned)
        bins = gradient[part].view(-1, c).to(torch.float32)
        few = max(1, TAPS // (index.shape[1] * c))
        for some, weights, values in zip(index.split(few), weight.split(few), bins.split(few), strict=True):
            pulled = weights[:, :, None] * values[:, None, :]
            table.index_add_(0, some.flatten(), pulled.flatten(0, 1))
    return table.view(n, h, w, c)


def multilevel_roi_align_reference(
    features: Sequence[Tensor],
    rois: Tensor,
    counts: Tensor | None,
    output_size: int,
    strides: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> Tensor:
    def pool_level(feature: Tensor, chosen: Tensor, stride: float) -> Tensor:
        return _pool_level(feature, chosen, output_size, stride, sampling_ratio, aligned)

    return pool_by_level(
        pool_level, features, rois, counts, output_size, strides, min_level, canonical_level, canonical_size
    )


def multilevel_roi_align_backward_reference(
    gradient: Tensor,
    sizes: Sequence[int],
    rois: Tensor,
    counts: Tensor | None,
    strides: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
    canonical_level: int,
    canonical_size: float,
) -> list[Tensor]:
    n, heights, widths = sizes[0], sizes[1::2], sizes[2::2]
    gradient = gradient.permute(0, 2, 3, 1).contiguous()
    chosen_by_level = split_by_level(n, len(heights), rois, counts, min_level, canonical_level, canonical_size)
    tables = [
        _pull_level(gradient[chosen], rois[chosen], (n, h, w), stride, sampling_ratio, aligned)
        for chosen, h, w, stride in zip(chosen_by_level, heights, widths, strides, strict=True)
    ]
    return [table.to(gradient.dtype).permute(0, 3, 1, 2) for table in tables]


def _fake(features: Sequence[Tensor], rois: Tensor, counts: Tensor | None, output_size: int, *form: Any) -> Tensor:
    return features[0].new_empty(rois.shape[0], output_size, output_size, features[0].shape[1]).permute(0, 3, 1, 2)


def _backward_fake(gradient: Tensor, sizes: Sequence[int], *form: Any) -> list[Tensor]:
    n, c = sizes[0], gradient.shape[1]
    return [gradient.new_empty(n, h, w, c).permute(0, 3, 1, 2) for h, w in zip(sizes[1::2], sizes[2::2], strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, counts, _, *ctx.form = inputs
    ctx.sizes = [features[0].shape[0], *(side for level in features for side in level.shape[2:])]
    ctx.save_for_backward(rois, counts)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return _roi_align_backward.dispatch(gradient, ctx.sizes, *ctx.saved_tensors, *ctx.form), *[None] * 9


FORM = "float[] strides, int sampling_ratio, bool aligned, int min_level, int canonical_level, float canonical_size"
_roi_align = Op(
    "multilevel_roi_align",
    f"(Tensor[] features, Tensor rois, Tensor? counts, int output_size, {FORM}) -> Tensor",
    multilevel_roi_align_reference,
    "fpn_kernels.triton.roi_align:launch_multilevel_roi_align",
    _fake,
    backward=_backward,
    save=_save,
)
_roi_align_backward = Op(
    "multilevel_roi_align_backward",
    f"(Tensor gradient, SymInt[] sizes, Tensor rois, Tensor? counts, {FORM}) -> Tensor[]",
    multilevel_roi_align_backward_reference,
    "fpn_kernels.triton.roi_align:launch_multilevel_roi_align_backward",
    _backward_fake,
)


def multilevel_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    counts: Tensor | None = None,
    *,
    output_size: int = 7,
    strides: Sequence[float] = (4, 8, 16, 32),
    sampling_ratio: int = 2,
    aligned: bool = False,
    min_level: int = 2,
    canonical_level: int = 4,
    canonical_size: float = 224,
) -> Tensor:
    """RoIAlign where each RoI is pooled from the level that eq. 1 assigns it to.

    Each of the output_size^2 bins is the mean of sampling_ratio^2 bilinear samples. ``aligned=False`` samples at
    coordinate / stride and widens RoIs to at least one cell; ``aligned=True`` shifts by half a cell and does not.
    Differentiable in ``features``.

    Args:
        features: levels finest first, each (N, C, H_l, W_l); fp32, fp16 or bf16; fastest if channels_last.
        rois: (R, 5) float32, batch index and x1 y1 x2 y2 in pixels of the network's input.
        counts: (N,) int64 or None. If given, rois hold R / N slots per image, image by image, of which only the first
            counts[n] are pooled; the others give zeros.
        output_size: bins per side. strides: pixels per cell of each level.
        sampling_ratio: samples per bin and axis; 0 takes ceil(RoI side / output_size), at most 128.
        min_level, canonical_level, canonical_size: level of features[0] and the constants of eq. 1.
    Returns: (R, C, output_size, output_size) in channels_last order, dtype of ``features``; RoIs with a non-finite
        coordinate give zeros.
    Raises: ValueError if shape or dtype differ from the above, or (on the CPU) for a batch index outside the batch;
        kernels mask such RoIs.
    """
    check_pooling(features, rois, counts, output_size, strides)
    require(sampling_ratio >= 0, "sampling_ratio must be 0 (adaptive) or more, not {}", sampling_ratio)
    form = (list(strides), sampling_ratio, aligned, min_level, canonical_level, canonical_size)
    return _roi_align(rois.device, list(features), rois, counts, output_size, *form)


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign on one feature map; ``torchvision.ops.roi_align``'s form, with square output.

    Args:
        input: (N, C, H, W). boxes: (R, 5) float32 with batch index, or one (R_n, 4) tensor per image.
        spatial_scale: cells per pixel. The rest as :func:`multilevel_roi_align`; sampling_ratio < 0 is adaptive too.
    Returns: (R, C, output_size, output_size).
    """
    return multilevel_roi_align(
        [input],
        number_boxes(input, boxes),
        output_size=output_size,
        strides=[1.0 / spatial_scale],
        sampling_ratio=max(sampling_ratio, 0),
        aligned=aligned,
    )
