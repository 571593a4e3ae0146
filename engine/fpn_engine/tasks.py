"""Tasks: what a runner is asked to do with a group of images, and what it gives back. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_engine.spec import MAX_DETECTIONS

if TYPE_CHECKING:
    import torch

OK, NON_FINITE = 0, 1

Array: TypeAlias = Any  # a torch tensor, or a NumPy array where there is no torch
AnyPixels: TypeAlias = "NDArray[np.uint8] | torch.Tensor"  # (H, W, 3) uint8 RGB; a tensor is on the engine's device


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What may change from call to call without a rebuild; scores and IoUs in 0..1.

    The boxes are the detections; those of an RPN alone are its proposals, and those of a mask-proposal model lie around
    its masks, which go through no NMS.
    """

    box_score_thresh: float
    box_nms_thresh: float
    box_detections_per_img: int

    def __post_init__(self) -> None:
        for name in ("box_score_thresh", "box_nms_thresh"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if not isinstance(self.box_detections_per_img, Integral) or self.box_detections_per_img < 1:
            raise ValueError(
                f"box_detections_per_img must be at least 1 and a whole number, not {self.box_detections_per_img}"
            )
        if self.box_detections_per_img > MAX_DETECTIONS:
            raise ValueError(
                f"box_detections_per_img must be at most {MAX_DETECTIONS}, not {self.box_detections_per_img}"
            )

    @classmethod
    def of(cls, spec: AnySpec) -> Self:
        if isinstance(spec, MaskSpec):
            return cls(box_score_thresh=0.0, box_nms_thresh=1.0, box_detections_per_img=spec.masks_per_img)
        of_boxes = (spec.box_score_thresh, spec.box_nms_thresh)
        score, nms = of_boxes if spec.has_box_head else (spec.rpn_score_thresh, spec.rpn_nms_thresh)
        return cls(box_score_thresh=score, box_nms_thresh=nms, box_detections_per_img=spec.box_detections_per_img)

    def override(self, **changes: Any) -> Self:
        """A copy with those of ``changes`` that are not None. Raises ValueError as the fields do."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is done with images of one padded size: (h, w) in pixels.

    ``thresholds`` are those of the detections; None asks for the RPN's proposals instead, at the spec's own.
    """

    padded_size: tuple[int, int]
    thresholds: Thresholds | None


class Group(NamedTuple):
    """Images that share a padded size.

    Attributes:
        images: each (H, W, 3) uint8, in host memory or on the device. image_sizes: resized (h, w) of each before
            padding.
        given: for a Fast R-CNN, the boxes (n, 4) float32 of each in pixels of the resized image.
    """

    images: Sequence[AnyPixels]
    image_sizes: Sequence[tuple[int, int]]
    given: Sequence[NDArray[np.float32]] | None = None


class PaddedDetections(NamedTuple):
    """Detections of a batch at fixed capacity D.

    Attributes:
        boxes: (N, D, 4) float32 in pixels of the resized image, 0 behind the last.
        scores: (N, D) float32, descending. labels: (N, D) int64, 1-based, 0 behind the last.
        counts: (N,) int64. status: (N,) int64, 0 or NON_FINITE: the network gave NaN or infinity.
    """

    boxes: Array
    scores: Array
    labels: Array
    counts: Array
    status: Array


class PaddedMasks(NamedTuple):
    """Mask proposals of a batch, best first, K slots for every image.

    Attributes:
        regions: (N, K, 4) float32, the squares that the masks cover, x1 y1 x2 y2 in pixels of the resized image; they
            may reach beyond it. scores: (N, K) float32 in 0..1, descending.
        masks: (N, K, S, S) float32, logits.
        counts: (N,) int64, those of the least score or more. status: (N,) int64, 0 or NON_FINITE.
    """

    regions: Array
    scores: Array
    masks: Array
    counts: Array
    status: Array


Found: TypeAlias = PaddedDetections | PaddedMasks


class Pending(Protocol):
    """A result that is on its way."""

    def wait(self) -> Found:
        """What was found, in host memory, a row per image. Waits for the device; any number of times."""
        ...


class Ready:
    """A result that is there."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def wait(self) -> Found:
        return self._found


class Runner(Protocol):
    """Runs groups of images; several threads may call it.

    Attributes:
        depth: groups that may be under way before the oldest is waited for; 0 where a group is done when it is
            submitted.
    """

    depth: int

    def submit(self, group: Group, task: Task) -> Pending:
        """Begin; waits for nothing but room."""
        ...

    def warm(self, group: Group, task: Task) -> None:
        """Prepare for groups like this one."""
        ...
