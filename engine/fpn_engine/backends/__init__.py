"""Backends run the two neural parts of a detector, the trunk and the box head; all else is fpn_kernels."""

from __future__ import annotations

from typing import NamedTuple, Protocol

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
    """Bottom-up network, pyramid and RPN head: (N, 3, H, W) normalised and padded images to TrunkOutput."""

    def __call__(self, images: Tensor, /) -> TrunkOutput: ...


class BoxHead(Protocol):
    """Fast R-CNN head: RoI features (R, C, S, S) to class logits (R, K + 1) and box deltas (R, 4 (K + 1))."""

    def __call__(self, roi_features: Tensor, /) -> tuple[Tensor, Tensor]: ...
