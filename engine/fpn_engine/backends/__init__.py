"""Backends run the two neural parts of a detector, the trunk and the box head; all else is fpn_kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # the light runner does without torch
    from torch import Tensor


class TrunkOutput(NamedTuple):
    """What the trunk makes of a batch (Lin et al. 2017, secs. 3 and 4.1); levels finest first.

    Attributes:
        features: the maps of ``ModelSpec.levels``, at least up to the last that RoIs are pooled from, each
            (N, C, H_l, W_l); logically NCHW in any memory format, channels_last preferred. An RPN alone may leave
            them out.
        objectness: logits, each (N, A, H_l, W_l); none without an RPN.
        deltas: box regression, each (N, 4A, H_l, W_l); channel a * 4 + i is component i of anchor a.
    """

    features: tuple[Tensor, ...]
    objectness: tuple[Tensor, ...]
    deltas: tuple[Tensor, ...]


class Trunk(Protocol):
    """Bottom-up network, pyramid and RPN head: (N, 3, H, W) normalised and padded images to TrunkOutput.

    Attributes that a trunk, and all but the first a head, may have and need not:
        input_dtype: what images should come as; without it float32.
        buffers: tensors on the device that it writes in every call and may exchange for others later, as for a larger
            batch. A captured graph keeps those of its time alive. Weights need not be among them.
        captures: False where it cannot be recorded in a CUDA graph; the engine then runs operation by operation.
    A part with buffers serves one stream at a time.
    """

    def __call__(self, images: Tensor, /) -> TrunkOutput: ...


class BoxHead(Protocol):
    """Fast R-CNN head: RoI features (R, C, S, S) to class logits (R, K + 1) and box deltas (R, 4 (K + 1))."""

    def __call__(self, roi_features: Tensor, /) -> tuple[Tensor, Tensor]: ...
