"""Top-down merge: nearest upsample plus lateral add (Lin et al. 2017, sec. 3, fig. 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_kernels.checks import FLOATS, require, require_device, require_dtype, require_shape
from fpn_kernels.registration import Op


def memory_format_of(lateral: Tensor) -> torch.memory_format:
    """channels_last if ``lateral`` is, else contiguous: the order of what is merged into it."""
    is_last = lateral.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def topdown_merge_reference(lateral: Tensor, coarse: Tensor) -> Tensor:
    up = coarse.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    merged = lateral + up[..., : lateral.shape[-2], : lateral.shape[-1]]
    return merged.contiguous(memory_format=memory_format_of(lateral))


def _topdown_merge_fake(lateral: Tensor, coarse: Tensor) -> Tensor:
    return torch.empty_like(lateral, memory_format=memory_format_of(lateral))


def _topdown_merge_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    # Each coarse cell gets the sum of its up to four children.
    return gradient, F.avg_pool2d(gradient, 2, ceil_mode=True, divisor_override=1)


_topdown_merge = Op(
    "topdown_merge",
    "(Tensor lateral, Tensor coarse) -> Tensor",
    topdown_merge_reference,
    "fpn_kernels.triton.topdown:launch_topdown_merge",
    _topdown_merge_fake,
    backward=_topdown_merge_backward,
)


def topdown_merge(lateral: Tensor, coarse: Tensor) -> Tensor:
    """Add ``coarse``, upsampled 2x by nearest neighbour, to ``lateral``: Pk' = lateral(Ck) + up(P(k+1)').

    out[n, c, y, x] = lateral[n, c, y, x] + coarse[n, c, y // 2, x // 2], which is nearest-neighbour resizing to
    the lateral's own size, odd sizes included. Differentiable in both arguments.

    Args:
        lateral: (N, C, H, W), level k after its 1x1 convolution; fp32, fp16 or bf16; any memory format, fastest if
            channels_last.
        coarse: (N, C, ceil(H / 2), ceil(W / 2)), merged level k + 1; same dtype and device.
    Returns: (N, C, H, W), same dtype, channels_last if ``lateral`` is, else contiguous.
    Raises: ValueError if shape, dtype or device differ from the above.
    """
    require(lateral.ndim == 4, "lateral must have shape (N, C, H, W), not {}", tuple(lateral.shape))
    n, c, h, w = lateral.shape
    require_shape("coarse", coarse, n, c, (h + 1) // 2, (w + 1) // 2)
    require_dtype("lateral", lateral, *FLOATS)
    require_dtype("coarse", coarse, lateral.dtype)
    require_device(lateral=lateral, coarse=coarse)
    return _topdown_merge(lateral.device, lateral, coarse)


def lateral_merge_reference(c: Tensor, weight: Tensor, bias: Tensor | None, coarser: Tensor | None) -> Tensor:
    merged = F.conv2d(c, weight[:, :, None, None], bias)
    if coarser is not None and merged.numel():
        merged = merged + F.interpolate(coarser, size=merged.shape[-2:], mode="nearest")
    return merged.contiguous(memory_format=torch.channels_last)


def _lateral_merge_fake(c: Tensor, weight: Tensor, bias: Tensor | None, coarser: Tensor | None) -> Tensor:
    n, _, h, w = c.shape
    return c.new_empty(n, h, w, weight.shape[0]).permute(0, 3, 1, 2)


def _save_lateral(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    c, weight, bias, coarser = inputs
    ctx.save_for_backward(c, weight)
    ctx.has_bias = bias is not None
    ctx.coarser_shape = None if coarser is None else list(coarser.shape)


def _lateral_merge_backward(
    ctx: Any, gradient: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    c, weight = ctx.saved_tensors
    wants_c, wants_weight, wants_bias, wants_coarser = ctx.needs_input_grad
    rows = gradient.permute(0, 2, 3, 1)
    of_c = of_weight = of_bias = of_coarser = None
    if wants_c:
        of_c = (rows @ weight).permute(0, 3, 1, 2)
    if wants_weight:
        of_weight = rows.flatten(0, 2).T @ c.permute(0, 2, 3, 1).flatten(0, 2)
    if wants_bias and ctx.has_bias:
        of_bias = gradient.sum(dim=(0, 2, 3))
    if wants_coarser and ctx.coarser_shape is not None:
        of_coarser = torch.ops.aten.upsample_nearest2d_backward(gradient, gradient.shape[2:], ctx.coarser_shape)
    return of_c, of_weight, of_bias, of_coarser


_lateral_merge = Op(
    "lateral_merge",
    "(Tensor c, Tensor weight, Tensor? bias, Tensor? coarser) -> Tensor",
    lateral_merge_reference,
    "fpn_kernels.triton.topdown:launch_lateral_merge",
    _lateral_merge_fake,
    backward=_lateral_merge_backward,
    save=_save_lateral,
)


def lateral_merge(c: Tensor, weight: Tensor, bias: Tensor | None = None, coarser: Tensor | None = None) -> Tensor:
    """A level's lateral 1x1 convolution and its merge in one pass: Pk' = weight Ck + bias + up(P(k+1)').

        F.conv2d(c, weight, bias) + F.interpolate(coarser, size=c.shape[2:], mode="nearest")

    On a GPU products are summed in float32 and rounded once, after all three terms. Differentiable in all arguments.

    Args:
        c: (N, C_in, H, W), output of stage k; fp32, fp16 or bf16; any memory format, fastest if channels_last.
        weight: (C_out, C_in) or (C_out, C_in, 1, 1). bias: (C_out,) or None.
        coarser: (N, C_out, H', W'), merged level k + 1, usually half as large, rounded up; None for the coarsest level.
            All of the dtype and device of ``c``.
    Returns: (N, C_out, H, W) in channels_last order, same dtype.
    Raises: ValueError if shape, dtype or device differ from the above.
    """
    require(c.ndim == 4, "c must have shape (N, C_in, H, W), not {}", tuple(c.shape))
    require_shape("weight", weight, None, c.shape[1], *(1, 1)[: max(weight.ndim - 2, 0)])
    require_dtype("c", c, *FLOATS)
    others = {"weight": weight, "bias": bias, "coarser": coarser}
    given = {name: tensor for name, tensor in others.items() if tensor is not None}
    if bias is not None:
        require_shape("bias", bias, weight.shape[0])
    if coarser is not None:
        require_shape("coarser", coarser, c.shape[0], weight.shape[0], None, None)
        require(coarser.shape[2] * coarser.shape[3] > 0, "coarser must have cells, not shape {}", tuple(coarser.shape))
    for name, tensor in given.items():
        require_dtype(name, tensor, c.dtype)
    require_device(c=c, **given)
    return _lateral_merge(c.device, c, weight.flatten(1), bias, coarser)
