"""Batching: which images go through the network together, and what is whose in the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpn_engine.masks.spec import AnySpec
from fpn_engine.resizing import padded_size, resized_size
from fpn_engine.tasks import NON_FINITE, PaddedDetections

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one padded size, by their index. ``image_sizes``: resized (h, w) of each, before padding."""

    indices: list[int]
    image_sizes: list[Size]
    padded_size: Size


def make_batches(
    shapes: Sequence[Size], spec: AnySpec, batch_size: int, bucket: Callable[[Size], Size]
) -> Iterator[Batch]:
    """Group images of original sizes ``shapes`` by the padded size that ``bucket`` takes, batch_size at a time."""
    groups: dict[Size, list[tuple[int, Size]]] = {}
    for index, (height, width) in enumerate(shapes):
        resized = resized_size(height, width, spec.min_size, spec.max_size)
        groups.setdefault(bucket(padded_size(resized, spec.size_divisor)), []).append((index, resized))
    for size, members in groups.items():
        for start in range(0, len(members), batch_size):
            indices, image_sizes = zip(*members[start : start + batch_size], strict=True)
            yield Batch(list(indices), list(image_sizes), size)


class Trimmed(NamedTuple):
    """What was found in one image: boxes (n, 4) float32 in pixels of the original; scores (n,); labels (n,) int64."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


def trim(found: PaddedDetections, row: int, shape: Size, image_size: Size) -> Trimmed | None:
    """What is real of row ``row``, on the host, in pixels of the original; None if the network gave NaN or infinity.

    Args: shape, image_size: (h, w) of the original and resized image.
    """
    if int(found.status[row]) == NON_FINITE:
        return None
    n = int(found.counts[row])
    boxes, scores, labels = (np.asarray(values[row, :n]) for values in (found.boxes, found.scores, found.labels))
    return Trimmed(boxes * size_ratio(shape, image_size), scores.copy(), labels.copy())


def size_ratio(of: Sequence[int], to: Sequence[int]) -> NDArray[np.float32]:
    """One (h, w) over another as x, y, x, y, rounded to float32 before it multiplies, as torchvision does."""
    h, w = (np.float32(side) / np.float32(other) for side, other in zip(of, to, strict=True))
    return np.array([w, h, w, h], dtype=np.float32)
