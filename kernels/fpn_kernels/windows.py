"""Windows of chosen locations, and a linear layer on them: a convolution evaluated where it is wanted alone.

Segmentation proposals need masks at 1000 of some 10^5 locations (Lin et al. 2017, sec. 6 and appendix A).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.checks import FLOATS, require, require_device, require_dtype, require_shape
from fpn_kernels.registration import Op


def _cells_of(places: Tensor, kernel: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows of an (N * H * W, C) table that make the windows, (R, kernel^2), and which of them there are."""
    reach = torch.arange(kernel, device=places.device) - kernel // 2
    y, x = places[:, 2, None] + reach, places[:, 3, None] + reach
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    rows = places[:, 0, None] * height + y.clamp(0, height - 1)
    index = rows[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]
    return index.flatten(1), inside.flatten(1)


def _choose(places: Tensor, level: int, images: int) -> Tensor:
    """Numbers of the places on a level of one of the images."""
    there = (places[:, 1] == level) & (places[:, 0] >= 0) & (places[:, 0] < images)
    return there.nonzero()[:, 0]


PORTION = 256  # windows whose numbers the reference has at a time: a few MB, which caches hold


def gather_windows_reference(features: Sequence[Tensor], places: Tensor, kernel: int) -> Tensor:
    n, c = features[0].shape[:2]
    out = features[0].new_zeros(len(places), kernel**2, c)
    for number, level in enumerate(features):
        chosen = _choose(places, number, n)
        if level.numel() and len(chosen):
            table = level.permute(0, 2, 3, 1).reshape(-1, c)
            index, inside = _cells_of(places[chosen], kernel, *level.shape[2:])
            rows = table.index_select(0, index.flatten()).view(*index.shape, c)
            out.index_copy_(0, chosen, rows.masked_fill_(~inside[..., None], 0))
    return out.view(-1, kernel, kernel, c)


def gather_windows_backward_reference(gradient: Tensor, sizes: Sequence[int], places: Tensor) -> list[Tensor]:
    n, kernel, c = sizes[0], gradient.shape[1], gradient.shape[3]
    levels = []
    for number, (h, w) in enumerate(zip(sizes[1::2], sizes[2::2], strict=True)):
        table = gradient.new_zeros(n * h * w, c, dtype=torch.float32)
        chosen = _choose(places, number, n)
        if table.numel() and len(chosen):
            index, inside = _cells_of(places[chosen], kernel, h, w)
            rows = gradient[chosen].view(*index.shape, c)[inside].to(torch.float32)
            table.index_add_(0, index[inside], rows)
        levels.append(table.view(n, h, w, c).to(gradient.dtype).permute(0, 3, 1, 2))
    return levels


def window_linear_reference(
    features: Sequence[Tensor], places: Tensor, weight: Tensor, bias: Tensor | None, kernel: int, relu: bool
) -> Tensor:
    out = torch.cat(
        [
            F.linear(gather_windows_reference(features, part, kernel).flatten(1), weight, bias)
            for part in places.split(PORTION)
        ]
    )
    return out.relu_() if relu else out


def _sizes_of(features: Sequence[Tensor]) -> list[int]:
    return [features[0].shape[0], *(side for level in features for side in level.shape[2:])]


def _gather_fake(features: Sequence[Tensor], places: Tensor, kernel: int) -> Tensor:
    return features[0].new_empty(places.shape[0], kernel, kernel, features[0].shape[1])


def _gather_backward_fake(gradient: Tensor, sizes: Sequence[int], places: Tensor) -> list[Tensor]:
    n, c = sizes[0], gradient.shape[3]
    return [gradient.new_empty(n, h, w, c).permute(0, 3, 1, 2) for h, w in zip(sizes[1::2], sizes[2::2], strict=True)]


def _linear_fake(
    features: Sequence[Tensor], places: Tensor, weight: Tensor, bias: Tensor | None, kernel: int, relu: bool
) -> Tensor:
    return features[0].new_empty(places.shape[0], weight.shape[0])


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, places, _ = inputs
    ctx.sizes = _sizes_of(features)
    ctx.save_for_backward(places)


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return _gather_windows_backward.dispatch(gradient.contiguous(), ctx.sizes, *ctx.saved_tensors), None, None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, places, weight, bias, ctx.kernel, relu = inputs
    ctx.has_bias, ctx.count = bias is not None, len(features)
    ctx.save_for_backward(places, weight, output if relu else None, *features)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    places, weight, output, *features = ctx.saved_tensors
    if output is not None:
        gradient = gradient * (output > 0)
    wants_weight, wants_bias = ctx.needs_input_grad[2:4]
    of_windows = (gradient @ weight).view(-1, ctx.kernel, ctx.kernel, features[0].shape[1])
    of_features = _gather_windows_backward.dispatch(of_windows, _sizes_of(features), places)
    of_weight = of_bias = None
    if wants_weight:
        of_weight = gradient.T @ _gather_windows.dispatch(features, places, ctx.kernel).flatten(1)
    if wants_bias and ctx.has_bias:
        of_bias = gradient.sum(dim=0)
    return of_features, None, of_weight, of_bias, None, None


_gather_windows = Op(
    "gather_windows",
    "(Tensor[] features, Tensor places, int kernel) -> Tensor",
    gather_windows_reference,
    "fpn_kernels.triton.windows:launch_gather_windows",
    _gather_fake,
    backward=_gather_backward,
    save=_save_gather,
)
_gather_windows_backward = Op(
    "gather_windows_backward",
    "(Tensor gradient, SymInt[] sizes, Tensor places) -> Tensor[]",
    gather_windows_backward_reference,
    "fpn_kernels.triton.windows:launch_gather_windows_backward",
    _gather_backward_fake,
)
_window_linear = Op(
    "window_linear",
    "(Tensor[] features, Tensor places, Tensor weight, Tensor? bias, int kernel, bool relu) -> Tensor",
    window_linear_reference,
    "fpn_kernels.triton.windows:launch_window_linear",
    _linear_fake,
    backward=_linear_backward,
    save=_save_linear,
)


def gather_windows(features: Sequence[Tensor], places: Tensor, kernel: int) -> Tensor:
    """The ``kernel`` x ``kernel`` cells around each of R places, zeros beyond the border as a convolution pads.

        F.unfold(features[level][image], kernel, padding=kernel // 2)[:, y * W + x]

    with the channels last, so that a row times a convolution's weight, (O, kernel, kernel, C), is its output there.
    Differentiable in ``features``.

    Args:
        features: levels finest first, each (N, C, H_l, W_l); fp32, fp16 or bf16; fastest if channels_last.
        places: (R, 4) int64: image, position of the level among ``features``, y and x in cells of the level.
        kernel: odd.
    Returns: (R, kernel, kernel, C), dtype of ``features``; zeros for a place of no image or no level, such as -1.
    Raises: ValueError if shape, dtype, device or kernel differ from the above.
    """
    _check(features, places, kernel)
    return _gather_windows(places.device, list(features), places, kernel)


def window_linear(
    features: Sequence[Tensor],
    places: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel: int,
    relu: bool = False,
) -> Tensor:
    """A convolution's output at R places: a linear layer on their windows, which on a GPU are never written.

        F.linear(gather_windows(features, places, kernel).flatten(1), weight, bias)

    On a GPU products are summed in float32 and rounded once. Differentiable in features, weight and bias.

    Args:
        features, places, kernel: as :func:`gather_windows`.
        weight: (O, kernel^2 C) in the order (y, x, channel): ``conv.weight.permute(0, 2, 3, 1).flatten(1)``.
        bias: (O,) or None; both of the dtype and device of ``features``.
        relu: max(0, ...) of the result.
    Returns: (R, O), same dtype; for a place of no image or no level what windows of zeros give.
    Raises: ValueError if shape, dtype, device or kernel differ from the above.
    """
    _check(features, places, kernel)
    require_shape("weight", weight, None, kernel**2 * features[0].shape[1])
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    if bias is not None:
        require_shape("bias", bias, weight.shape[0])
    for name, tensor in given.items():
        require_dtype(name, tensor, features[0].dtype)
    require_device(places=places, **given)
    return _window_linear(places.device, list(features), places, weight, bias, kernel, relu)


def _check(features: Sequence[Tensor], places: Tensor, kernel: int) -> None:
    require(len(features) >= 1, "features must hold at least one level")
    require(kernel >= 1 and kernel % 2 == 1, "kernel must be odd and at least 1, not {}", kernel)
    require_shape("features", features[0], None, None, None, None)
    for level in features:
        require_shape("features", level, *features[0].shape[:2], None, None)
        require_dtype("features", level, *FLOATS)
        require_dtype("features", level, features[0].dtype)
    require_shape("places", places, None, 4)
    require_dtype("places", places, torch.int64)
    require_device(places=places, **{f"features[{i}]": level for i, level in enumerate(features)})
