"""Which images of a batch came out NaN or infinite: a look at every number, by its exponent's bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_kernels.checks import FLOATS, require, require_device, require_dtype, require_shape
from fpn_kernels.registration import Op


def find_nonfinite_reference(tensors: Sequence[Tensor], known: Tensor | None) -> Tensor:
    """A sum carries NaN and infinity at one read; only where it is not finite itself are the numbers looked at."""
    n = tensors[0].shape[0]
    status = torch.zeros(n, dtype=torch.int64, device=tensors[0].device) if known is None else known.clone()
    for tensor in tensors:
        flat = tuple(range(1, tensor.ndim))
        # Only float16 overflows often; asked for float32, torch on the CPU copies a bfloat16 map first.
        dtype = torch.float32 if tensor.dtype == torch.float16 else None
        if not bool(tensor.detach().sum(dim=flat, dtype=dtype).isfinite().all()):
            status |= (~tensor.isfinite()).flatten(1).any(dim=1)
    return status


def _fake(tensors: Sequence[Tensor], known: Tensor | None) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape[0], dtype=torch.int64)


_find_nonfinite = Op(
    "find_nonfinite",
    "(Tensor[] tensors, Tensor? known) -> Tensor",
    find_nonfinite_reference,
    "fpn_kernels.triton.finiteness:launch_find_nonfinite",
    _fake,
)


def find_nonfinite(tensors: Sequence[Tensor], known: Tensor | None = None) -> Tensor:
    """Whether anything of an image is NaN or infinite: ``(~t.isfinite()).flatten(1).any(1)``, over all tensors.

    Args:
        tensors: at least one, each (N, ...) with two axes or more, of any layout; fp32, fp16 or bf16, which may mix.
        known: (N,) int64, what an earlier look has found; it is kept.
    Returns: (N,) int64, 1 for an image with such a number and 0 for one without.
    Raises: ValueError if shape or dtype differ from the above.
    """
    require(len(tensors) >= 1, "tensors must hold at least one tensor")
    require(tensors[0].ndim >= 2, "tensors must have an axis behind that of images, not shape {}", tensors[0].shape)
    n = tensors[0].shape[0]
    for tensor in tensors:
        require(tensor.ndim >= 2, "tensors must have an axis behind that of images, not shape {}", tensor.shape)
        require_shape("tensors", tensor, n, *[None] * (tensor.ndim - 1))
        require_dtype("tensors", tensor, *FLOATS)
    named = {f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)}
    if known is not None:
        require_shape("known", known, n)
        require_dtype("known", known, torch.int64)
        named["known"] = known
    require_device(**named)
    return _find_nonfinite(tensors[0].device, list(tensors), known)
