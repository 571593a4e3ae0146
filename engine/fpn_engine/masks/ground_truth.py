"""Ground truth of segments: COCO annotations whose polygons and run lengths are read too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fpn_engine.annotations import load_coco
from fpn_engine.errors import AnnotationError
from fpn_engine.ground_truth import AnnotatedImage, Annotation, CocoGroundTruth
from fpn_engine.masks.run_lengths import RunLengths, areas_of, box_of, read_segmentation
from fpn_engine.spec import OBJECT
from fpn_engine.voc import is_voc


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTruth:
    """Annotations and, in the same order, the mask of each."""

    truth: CocoGroundTruth
    segments: tuple[RunLengths, ...]


def load_segments(path: str | Path) -> SegmentTruth:
    """Read a COCO annotation file with its segmentations; without an ``area`` an object has its mask's.

    Raises: AnnotationError as :func:`fpn_engine.annotations.load_coco`, for Pascal VOC's, which have none, and for an
        annotation without a segmentation or with one that is none.
    """
    if is_voc(path):
        raise AnnotationError(f"{path} is of Pascal VOC, which has boxes alone; masks need COCO annotations")
    truth = load_coco(path)
    with open(path, encoding="utf-8-sig") as file:
        entries = json.load(file)["annotations"]
    sizes = {image.id: (image.height, image.width) for image in truth.images}
    annotations, segments = [], []
    for annotation, entry in zip(truth.annotations, entries, strict=True):
        if "segmentation" not in entry:
            raise AnnotationError(
                f"the annotations {path} have an object without a segmentation; masks need polygons or run lengths"
            )
        try:
            segments.append(read_segmentation(entry["segmentation"], sizes[annotation.image_id]))
        except AnnotationError as error:
            raise AnnotationError(f"the annotations {path}: {error}") from None
        if "area" not in entry:
            annotation = dataclasses.replace(annotation, area=areas_of(segments[-1:])[0])
        annotations.append(annotation)
    return SegmentTruth(truth=dataclasses.replace(truth, annotations=tuple(annotations)), segments=tuple(segments))


def describe_segments(
    images: Sequence[tuple[str, tuple[int, int]]], segments: Sequence[Sequence[RunLengths]]
) -> SegmentTruth:
    """Ground truth of masks that are in memory, all of one class, images numbered from 1.

    Args: images: name, and height and width of each. segments: its objects' masks.
    """
    annotations = [
        Annotation(image_id=number, category_id=OBJECT.id, bbox=_bbox(one), area=areas_of([one])[0], iscrowd=False)
        for number, of_image in enumerate(segments, start=1)
        for one in of_image
    ]
    listed = [
        AnnotatedImage(id=number, file_name=name, height=size[0], width=size[1])
        for number, (name, size) in enumerate(images, start=1)
    ]
    truth = CocoGroundTruth(images=tuple(listed), categories=(OBJECT,), annotations=tuple(annotations))
    return SegmentTruth(truth=truth, segments=tuple(one for of_image in segments for one in of_image))


def _bbox(one: RunLengths) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box_of(one)
    return x1, y1, x2 - x1, y2 - y1


def as_coco(annotation: Annotation, segment: RunLengths) -> dict[str, object]:
    """An annotation as pycocotools wants it."""
    return dataclasses.asdict(annotation) | {"bbox": list(annotation.bbox), "segmentation": segment}
