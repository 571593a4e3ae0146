"""Examples: annotated images of a data set, read when they are asked for."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fpn_engine.annotations import CocoGroundTruth
from fpn_engine.errors import AnnotationError
from fpn_engine.ground_truth import check_images, check_size
from fpn_engine.images import to_array
from fpn_engine.proposals import Boxes, ProposalBoxes
from fpn_engine.spec import Category


class Example(NamedTuple):
    """One image and what is to be found in it.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        boxes: (M, 4) float32, x1 y1 x2 y2 in pixels of the image. labels: (M,) int64 from 1.
        proposals: (R, 4) float32, boxes for a Fast R-CNN to classify, or None.
    """

    pixels: NDArray[np.uint8]
    boxes: Boxes
    labels: NDArray[np.int64]
    proposals: Boxes | None = None


class Examples(Protocol):
    """What a detector is trained on. ``shapes`` are (height, width) of each image, for batches of one orientation."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True, slots=True)
class _Listed:
    path: Path
    shape: tuple[int, int]
    boxes: Boxes
    labels: NDArray[np.int64]
    proposals: Boxes | None


class AnnotatedExamples:
    """The images of an annotation file that have objects, boxes cut to the image; without area they are left out.

    Crowds are left out as well.

    Args:
        truth: the annotations. folder: where its images lie.
        categories: of the model, in label order; annotations of other categories are left out.
        proposals: gives those of the image of a file name, for Fast R-CNN.
    Raises: AnnotationError if images are missing or none has an object; ProposalError from ``proposals``.
    """

    def __init__(
        self,
        truth: CocoGroundTruth,
        folder: Path,
        categories: Sequence[Category],
        proposals: Callable[[str], ProposalBoxes] | None = None,
    ) -> None:
        truth.check_categories(categories)
        labels = {category.id: label for label, category in enumerate(categories, start=1)}
        objects: dict[int, list[tuple[float, float, float, float, int]]] = {image.id: [] for image in truth.images}
        sizes = {image.id: (image.width, image.height) for image in truth.images}
        for annotation in truth.annotations:
            if not annotation.iscrowd and annotation.category_id in labels:
                x1, y1, x2, y2 = _cut(annotation.bbox, *sizes[annotation.image_id])
                if x1 < x2 and y1 < y2:
                    objects[annotation.image_id].append((x1, y1, x2, y2, labels[annotation.category_id]))
        self._listed = []
        for image in truth.images:
            rows = np.array(objects[image.id], np.float64).reshape(-1, 5)
            if len(rows) == 0:
                continue
            self._listed.append(
                _Listed(
                    folder / image.file_name,
                    (image.height, image.width),
                    rows[:, :4].astype(np.float32),
                    rows[:, 4].astype(np.int64),
                    None if proposals is None else proposals(image.file_name).boxes,
                )
            )
        if not self._listed:
            raise AnnotationError("no annotated image has an object to learn; check the annotations")
        check_images([entry.path for entry in self._listed], folder)
        self.shapes = [entry.shape for entry in self._listed]

    def __len__(self) -> int:
        return len(self._listed)

    def digest_proposals(self) -> str | None:
        """What identifies the proposals of all images, or None if none are given."""
        given = [entry.proposals for entry in self._listed if entry.proposals is not None]
        digest = hashlib.sha256()
        for boxes in given:
            digest.update(f"{boxes.shape}".encode())
            digest.update(boxes.tobytes())
        return digest.hexdigest() if given else None

    def objects_of(self, index: int) -> tuple[Boxes, NDArray[np.int64]]:
        """Boxes and labels of an image that is not read for it."""
        return self._listed[index].boxes, self._listed[index].labels

    def __getitem__(self, index: int) -> Example:
        """Raises: ImageError for an image that cannot be read or has another size than annotated."""
        entry = self._listed[index]
        pixels = to_array(entry.path)
        check_size(entry.path, pixels.shape[:2], entry.shape)
        return Example(pixels, entry.boxes, entry.labels, entry.proposals)


def _cut(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """The corners of a COCO box, x y width height, moved into the image."""
    x, y, across, down = box
    return max(x, 0.0), max(y, 0.0), min(x + across, float(width)), min(y + down, float(height))


class JoinedExamples:
    """Several sets of examples, one after another."""

    def __init__(self, parts: Sequence[Examples]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))
        self.shapes = [shape for part in parts for shape in part.shapes]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]
