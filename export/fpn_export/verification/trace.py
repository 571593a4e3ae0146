"""What a detector computes on the way from one image to its detections, stage by stage, in host memory as float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fpn_engine.detections import Detections
from fpn_engine.spec import ModelSpec

IMAGE, BOTTOM_UP, PYRAMID = "preprocessed image", "bottom-up network", "pyramid"
OBJECTNESS, DELTAS, PROPOSALS = "objectness", "deltas", "proposals"
ROI_FEATURES, CLASS_LOGITS, BOX_DELTAS, DETECTIONS = "RoI features", "class logits", "box deltas", "detections"
STAGES = (
    *(IMAGE, BOTTOM_UP, PYRAMID, OBJECTNESS, DELTAS),
    *(PROPOSALS, ROI_FEATURES, CLASS_LOGITS, BOX_DELTAS, DETECTIONS),
)
TRUNK = (BOTTOM_UP, PYRAMID, OBJECTNESS, DELTAS)
COARSEST_LATERAL = 5  # p5 is made of c5 alone, p4 of it and c4, and so on; p6 and p7 come out of p5

Maps = dict[str, Tensor]


class Input(NamedTuple):
    """One preprocessed image.

    Attributes:
        image: (1, 3, H, W), normalised and padded. image_sizes: (1, 2) int64, resized h and w before padding.
        shape: (h, w) of the original in pixels.
    """

    image: Tensor
    image_sizes: Tensor
    shape: tuple[int, int]

    @property
    def padded_size(self) -> tuple[int, int]:
        return self.image.shape[2], self.image.shape[3]


class Boxes(NamedTuple):
    """Proposals of one image, best first: boxes (n, 4) in pixels of the resized image, scores (n,)."""

    boxes: Tensor
    scores: Tensor


class Answer(NamedTuple):
    """The box head's: class logits (n, K + 1) and box deltas (n, 4 (K + 1))."""

    class_logits: Tensor
    box_deltas: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All stages of one image; those that a system has not are None.

    Attributes:
        maps: the trunk's by name, (1, C, H, W): c2.. where they are exposed, p2.., objectness_p2.., deltas_p2...
        roi_features: (n, C, S, S), a row for each proposal.
        detections: in pixels of the original. finite: no NaN or infinity among what they were made of.
    """

    input: Input
    maps: Maps
    proposals: Boxes | None
    roi_features: Tensor | None
    answer: Answer | None
    detections: Detections
    finite: bool


def order_maps(spec: ModelSpec, maps: Maps) -> Iterator[tuple[str, str, str]]:
    """(stage, level, name of the map) in the order of the dataflow: a fault in one map spoils only those behind it.

    The pyramid is built from p5 down (Lin et al. 2017, fig. 3).
    """
    for name in sorted(name for name in maps if name[0] == "c" and name[1:].isdigit()):
        yield BOTTOM_UP, name, name
    levels = [name for name in spec.level_names if name[0] != "c"]
    descending = [name for name in reversed(levels) if int(name[1:]) <= COARSEST_LATERAL]
    for name in [*descending, *(name for name in levels if name not in descending)]:
        if name in maps:
            yield PYRAMID, name, name
    for stage in (OBJECTNESS, DELTAS):
        for level in spec.level_names:
            if f"{stage}_{level}" in maps:
                yield stage, level, f"{stage}_{level}"
