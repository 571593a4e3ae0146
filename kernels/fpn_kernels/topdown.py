"""Top-down merge: 2x nearest upsample plus lateral add (Lin et al. 2017, sec. 3, fig. 3)."""

from __future__ import annotations

from torch import Tensor

from fpn_kernels.checks import FLOATS, require, require_device, require_dtype, require_shape


def topdown_merge_reference(lateral: Tensor, coarse: Tensor) -> Tensor:
    up = coarse.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    return lateral + up[..., : lateral.shape[-2], : lateral.shape[-1]]


def topdown_merge(lateral: Tensor, coarse: Tensor) -> Tensor:
    """Add ``coarse``, upsampled 2x by nearest neighbour, to ``lateral``: Pk' = lateral(Ck) + up(P(k+1)').

    out[n, c, y, x] = lateral[n, c, y, x] + coarse[n, c, y // 2, x // 2], which is nearest-neighbour resizing to
    the lateral's own size, odd sizes included. Differentiable in both arguments.

    Args:
        lateral: (N, C, H, W), level k after its 1x1 convolution; fp32, fp16 or bf16; any memory format.
        coarse: (N, C, ceil(H / 2), ceil(W / 2)), merged level k + 1; same dtype and device.
    Returns: (N, C, H, W), same dtype.
    Raises: ValueError if shape, dtype or device differ from the above.
    """
    require(lateral.ndim == 4, f"lateral must have shape (N, C, H, W), not {tuple(lateral.shape)}")
    n, c, h, w = lateral.shape
    require_shape("coarse", coarse, n, c, (h + 1) // 2, (w + 1) // 2)
    require_dtype("lateral", lateral, *FLOATS)
    require_dtype("coarse", coarse, lateral.dtype)
    require_device(lateral=lateral, coarse=coarse)
    return topdown_merge_reference(lateral, coarse)
