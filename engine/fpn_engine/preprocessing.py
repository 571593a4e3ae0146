"""Preprocessing: packed images to what a trunk of a spec takes."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_engine.masks.spec import AnySpec
from fpn_kernels import PackedImages, preprocess


def preprocess_batch(
    spec: AnySpec, packed: PackedImages, image_sizes: Tensor, padded_size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """(N, 3, *padded_size) of ``dtype``, normalised, resized and padded as ``spec`` has it.

    Args: image_sizes: (N, 2) int64, resized height and width before padding.
    """
    return preprocess(
        *packed,
        image_sizes,
        padded_size,
        spec.image_mean,
        spec.image_std,
        reverse_channels=spec.channel_order == "bgr",
        dtype=dtype,
    )
