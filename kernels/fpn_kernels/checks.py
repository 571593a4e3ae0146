"""Argument checks shared by the public ops; they read shapes and dtypes, never values.

Messages are written only when they are raised: torch.compile binds a graph to every size that is written out, and to
every ``len`` of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def require(ok: bool, message: str, *values: object) -> None:
    """Raise ValueError with ``message``, the values in place of its braces, unless ``ok``."""
    if not ok:
        raise ValueError(message.format(*values))


def require_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """``tensor`` must have this shape; None stands for any size."""
    fits = tensor.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({want}), not {tuple(tensor.shape)}")


def require_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        allowed, given = (", ".join(str(d).removeprefix("torch.") for d in some) for some in (dtypes, [tensor.dtype]))
        raise ValueError(f"{name} must be {allowed}, not {given}")


def require_device(**tensors: Tensor) -> None:
    """All tensors must lie on one device."""
    devices = {tensor.device for tensor in tensors.values()}
    require(len(devices) <= 1, "{} must lie on one device, not {}", ", ".join(tensors), sorted(map(str, devices)))
