"""What was found in a scene beside what is there, object by object."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpn_engine.detections import Detections
from fpn_export.scenes import NAMES, Scene

LEAST_IOU = 0.5  # from which a box counts as that of an object, as in AP50


class Pair(NamedTuple):
    """An object of the scene and the detection of it, if any.

    Attributes:
        name: of the object's class. width, height: of its visible part, pixels. coverage: share of it that others hide.
        score, iou: of the detection; None where the object was missed.
    """

    name: str
    width: int
    height: int
    coverage: float
    score: float | None
    iou: float | None


class Comparison(NamedTuple):
    """All objects of a scene, largest first, and the detections that are of none: (class name, score)."""

    pairs: list[Pair]
    spurious: list[tuple[str, float]]

    @property
    def found(self) -> int:
        """How many objects were found."""
        return sum(pair.score is not None for pair in self.pairs)


def compare(scene: Scene, detections: Detections) -> Comparison:
    """Give each detection, best first, the free object of its class that it overlaps most, from an IoU of 0.5."""
    ious = _iou(detections.boxes, scene.boxes)
    names = [NAMES[label - 1] for label in scene.labels.tolist()]
    owners: dict[int, int] = {}
    spurious = []
    for row, (name, score) in enumerate(zip(detections.names, detections.scores.tolist(), strict=True)):
        free = [i for i in range(len(names)) if i not in owners and names[i] == name and ious[row, i] >= LEAST_IOU]
        if free:
            owners[max(free, key=lambda i: float(ious[row, i]))] = row
        else:
            spurious.append((name, score))
    sides = (scene.boxes[:, 2:] - scene.boxes[:, :2]).astype(int)
    pairs = []
    for index in np.argsort(-sides.prod(axis=1), kind="stable").tolist():
        owner = owners.get(index)
        pairs.append(
            Pair(
                name=names[index],
                width=int(sides[index, 0]),
                height=int(sides[index, 1]),
                coverage=float(scene.coverage[index]),
                score=None if owner is None else float(detections.scores[owner]),
                iou=None if owner is None else float(ious[owner, index]),
            )
        )
    return Comparison(pairs, spurious)


def _iou(boxes: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoU of (n, 4) and (m, 4) boxes, (n, m); 0 where both have no area."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    areas = [(b[:, 2:] - b[:, :2]).clip(0).prod(axis=1) for b in (boxes, others)]
    iou: NDArray[np.float32] = shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9)
    return iou
