"""Argument checks shared by the public ops; they read shapes and dtypes, never values."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def require(ok: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``ok``."""
    if not ok:
        raise ValueError(message)


def require_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """``tensor`` must have this shape; None stands for any size."""
    fits = tensor.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    want = ", ".join("any" if size is None else str(size) for size in shape)
    require(fits, f"{name} must have shape ({want}), not {tuple(tensor.shape)}")


def require_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    require(tensor.dtype in dtypes, f"{name} must be {allowed}, not {str(tensor.dtype).removeprefix('torch.')}")


def require_device(**tensors: Tensor) -> None:
    """All tensors must lie on one device."""
    devices = {tensor.device for tensor in tensors.values()}
    require(len(devices) <= 1, f"{', '.join(tensors)} must lie on one device, not {sorted(map(str, devices))}")
