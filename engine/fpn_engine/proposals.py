"""Proposals: class-agnostic boxes for a Fast R-CNN to classify (Lin et al. 2017, secs. 4.1 and 4.2)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fpn_engine.errors import AnnotationError, ProposalError
from fpn_engine.results import find_image_id

Boxes = NDArray[np.float32]  # (n, 4), x1 y1 x2 y2 in pixels of the original image


class ProposalBoxes(NamedTuple):
    """Class-agnostic proposals of one image, best first.

    Attributes: boxes (n, 4) float32 in pixels of the original image; scores (n,) float32 in 0..1.
    """

    boxes: Boxes
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposedImage:
    """The proposals of one image of a file, with what the file calls it: a name, an id or both."""

    file_name: str | None
    image_id: int | str | None
    proposals: ProposalBoxes


class GivenProposals:
    """The proposals of many images, found by path.

    An image is the one whose file name is the path or its longest ending. Where none is, or several have that name, it
    is the one of the id that the annotations give the path, or without annotations its stem (see
    :class:`fpn_engine.results.CocoWriter`), unless it is called otherwise. It is not guessed which of several.

    Args:
        path: the file they came from, for messages. images: all of them.
        image_ids: the annotations' id of each file name, if there are annotations.
    """

    def __init__(self, path: Path, images: Sequence[ProposedImage], image_ids: Mapping[str, int] | None = None) -> None:
        self._path = path
        self._image_ids = image_ids
        self._by_id: dict[int | str, list[ProposedImage]] = {}
        self._by_name: dict[str, list[ProposalBoxes]] = {}
        for image in images:
            if image.image_id is not None:
                self._by_id.setdefault(image.image_id, []).append(image)
            if image.file_name is not None:
                self._by_name.setdefault(PurePath(image.file_name).as_posix(), []).append(image.proposals)

    def __call__(self, source: str) -> ProposalBoxes:
        """Those of the image at path ``source``. Raises ProposalError if the file does not have it, or not it alone."""
        parts, several = PurePath(source).parts, False
        for start in range(len(parts)):
            named = self._by_name.get(PurePath(*parts[start:]).as_posix(), [])
            if len(named) == 1:
                return named[0]
            several |= len(named) > 1
        with contextlib.suppress(KeyError, AnnotationError):
            listed = self._by_id[find_image_id(source, self._image_ids)]
            known = {None, PurePath(source).name}
            fitting = [one for one in listed if (one.file_name and PurePath(one.file_name).name) in known]
            if len(fitting) == 1:
                return fitting[0].proposals
            several |= len(fitting) > 1
        if several:
            raise ProposalError(
                f"{self._path}, or the files given with it, have proposals of several images for {source!r}; give each "
                "image a file name of its own"
            )
        raise ProposalError(f"{self._path} has no proposals for the image {source!r}; give the file that belongs to it")


def as_boxes(proposals: Sequence[ProposalBoxes | ArrayLike], images: int) -> list[Boxes]:
    """Proposals of ``images`` images as a float32 array each.

    Raises: ProposalError if there are not as many as images, or one holds anything but finite boxes (n, 4) with
        x1 <= x2 and y1 <= y2.
    """
    if len(proposals) != images:
        raise ProposalError(f"there are proposals for {len(proposals)} images, but {images} images")
    return [_as_boxes(given, f"the proposals of image {number}") for number, given in enumerate(proposals)]


def _as_boxes(given: ProposalBoxes | ArrayLike, what: str) -> Boxes:
    try:
        boxes = np.asarray(given.boxes if isinstance(given, ProposalBoxes) else given, dtype=np.float32)
    except (TypeError, ValueError):
        raise ProposalError(f"{what} are no array of numbers") from None
    if boxes.size == 0:
        return boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ProposalError(f"{what} must be boxes of shape (n, 4), not {boxes.shape}")
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ProposalError(f"{what} must be finite boxes x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    return boxes
