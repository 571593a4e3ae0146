"""Detections: what was found in one image, on the host, trimmed to what is there."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fpn_engine.masks.polygons import trace_polygons
from fpn_engine.masks.run_lengths import Masks, RunLengths, decode_masks
from fpn_engine.spec import Category


class Detection(NamedTuple):
    """One object: its box in pixels of the original image, score in 0..1 and category."""

    box: tuple[float, float, float, float]
    score: float
    category: Category


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """The objects of one image, best first.

    Attributes:
        boxes: (n, 4) float32, x1 y1 x2 y2 in pixels of the upright original image, half-open.
        scores: (n,) float32, descending.
        labels: (n,) int64, 1-based index into ``categories`` (0 would be background).
        image_size: (height, width) of the original image in pixels.
        categories: the classes the model knows, in label order.
        source: where the image came from, if it was a file.
        run_lengths: the mask of each, of the original image, where the model makes masks; boxes are then around them.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    image_size: tuple[int, int]
    categories: tuple[Category, ...]
    source: str | None = None
    run_lengths: tuple[RunLengths, ...] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        for box, score, label in zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True):
            yield Detection(tuple(box), score, self.categories[label - 1])

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.categories[label - 1].name for label in self.labels.tolist()]

    @property
    def category_ids(self) -> NDArray[np.int64]:
        """(n,) int64, the data set's own id of each detection."""
        ids = np.array([0, *(category.id for category in self.categories)], dtype=np.int64)
        return ids[self.labels]

    @property
    def masks(self) -> Masks | None:
        """(n, H, W) bool in pixels of the original image; None of a model without masks."""
        return None if self.run_lengths is None else decode_masks(self.run_lengths, self.image_size)

    @property
    def polygons(self) -> list[list[list[float]]] | None:
        """The outlines of each mask, as :func:`fpn_engine.masks.polygons.trace_polygons` gives them, or None."""
        if self.run_lengths is None:
            return None
        return [trace_polygons(decode_masks([one], self.image_size)[0]) for one in self.run_lengths]

    def filter(self, *, min_score: float = 0.0, classes: Collection[str | int] | None = None) -> Self:
        """Only those with score >= ``min_score`` and a class among ``classes`` (names or category ids, or one name)."""
        keep = self.scores >= min_score
        if isinstance(classes, str):
            classes = [classes]
        if classes is not None:
            wanted = [c.name in classes or c.id in classes for c in self.categories]
            keep = keep & np.array([False, *wanted])[self.labels]
        return self._take(np.nonzero(keep)[0])

    def best(self, n: int) -> Self:
        """The ``n`` with the highest scores, or all if there are fewer."""
        return self._take(np.arange(min(n, len(self))))

    def _take(self, rows: NDArray[np.int64]) -> Self:
        masks = None if self.run_lengths is None else tuple(self.run_lengths[row] for row in rows.tolist())
        return replace(
            self, boxes=self.boxes[rows], scores=self.scores[rows], labels=self.labels[rows], run_lengths=masks
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: image, height, width and a list of {category_id, name, score, box}.

        Of a model that makes masks each has a "mask" too, a compressed COCO RLE, {"size": [height, width], "counts"}.
        """
        rows = zip(
            self.category_ids.tolist(),
            self.names,
            shortest_floats(self.scores),
            shortest_floats(self.boxes),
            strict=True,
        )
        found: list[dict[str, Any]] = [
            dict(zip(("category_id", "name", "score", "box"), row, strict=True)) for row in rows
        ]
        for detection, mask in zip(found, self.run_lengths or (), strict=self.run_lengths is not None):
            detection["mask"] = dict(mask)
        return {
            "image": self.source,
            "height": self.image_size[0],
            "width": self.image_size[1],
            "detections": found,
        }


def shortest_floats(values: NDArray[np.float32]) -> list[Any]:
    """float32 as nested lists of Python floats with the fewest digits that round back: 0.98, not 0.980000019."""
    shortest: list[Any] = values.astype(np.str_).astype(np.float64).tolist()
    return shortest
