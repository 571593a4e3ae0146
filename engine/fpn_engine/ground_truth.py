"""Ground truth: the objects that detections are scored against, whatever format they were annotated in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fpn_engine.errors import AnnotationError, ImageError
from fpn_engine.spec import Category


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedImage:
    """One image of an annotation file; sides in pixels."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One object: bbox (x, y, width, height) and area in pixels; a crowd stands for many objects."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    iscrowd: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoGroundTruth:
    """The annotations of a data set, each list in the order of the file. Category ids may have gaps."""

    images: tuple[AnnotatedImage, ...]
    categories: tuple[Category, ...]
    annotations: tuple[Annotation, ...]

    @property
    def image_ids(self) -> dict[str, int]:
        """The id of each file_name."""
        return {image.file_name: image.id for image in self.images}

    def check_categories(self, categories: Iterable[Category]) -> None:
        """Raise AnnotationError if an id means another class to the model than to these annotations, or a class has
        another id.

        Scores would silently be near zero, as between COCO ids (1-90, with gaps) and consecutive ones (1-80).
        Ids that only one side has are fine, and so are the stand-in names of a checkpoint without names.
        """
        names = {category.id: category.name for category in self.categories}
        ids = {category.name: category.id for category in self.categories}
        for category in categories:
            if category.name == f"class_{category.id}":
                continue
            name, number = names.get(category.id, category.name), ids.get(category.name, category.id)
            if name != category.name:
                raise AnnotationError(
                    f"category {category.id} is {category.name!r} to the model but {name!r} in the annotations; "
                    "use the annotations that the model was trained for"
                )
            if number != category.id:
                raise AnnotationError(
                    f"{category.name!r} is category {category.id} to the model but {number} in the annotations; "
                    "use the annotations that the model was trained for"
                )


def check_images(paths: Sequence[Path], folder: Path, option: str = "--images") -> None:
    """Raises AnnotationError, which counts those of ``paths`` that are no files, if ``option`` named a wrong folder."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise AnnotationError(
            f"{len(missing)} of {len(paths)} annotated images are not in {folder}, the first is {missing[0].name}; "
            f"check {option}"
        )


def check_objects(truth: CocoGroundTruth, path: Path) -> None:
    """Raises AnnotationError if the file at ``path`` has no object that a model could find."""
    if all(annotation.iscrowd for annotation in truth.annotations):
        raise AnnotationError(f"{path} has no object to score on")


def check_size(path: Path, found: tuple[int, int], annotated: tuple[int, int]) -> None:
    """Raises ImageError if an image is ``found`` to have another (height, width) than its boxes were drawn on."""
    if found != annotated:
        raise ImageError(
            f"{path} is {found[1]}x{found[0]} pixels, but its annotations are for {annotated[1]}x{annotated[0]}"
        )
