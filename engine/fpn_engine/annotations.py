"""Annotation files: COCO instances JSON, and the way to VOC's XML files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fpn_engine.errors import AnnotationError
from fpn_engine.ground_truth import AnnotatedImage, Annotation, CocoGroundTruth
from fpn_engine.spec import Category
from fpn_engine.spec_json import finite_number, whole_number
from fpn_engine.voc import find_voc_images, is_voc, load_voc


def load_annotations(path: str | Path) -> CocoGroundTruth:
    """Read the annotations at ``path``: a COCO JSON file, a VOC folder, or a list of names (.txt) in a VOC folder.

    Raises: AnnotationError as :func:`load_coco` and :func:`fpn_engine.voc.load_voc` do.
    """
    return load_voc(path) if is_voc(path) else load_coco(path)


def find_images(path: str | Path) -> Path:
    """The folder of the images that the annotations at ``path`` name, where the format says which.

    Raises: AnnotationError for COCO annotations, which have no such folder.
    """
    if not is_voc(path):
        raise AnnotationError(f"{path} does not say where its images are; name their folder with --images")
    return find_voc_images(path)


def load_coco(path: str | Path) -> CocoGroundTruth:
    """Read a COCO annotation file; ``iscrowd`` and ``area`` may be missing (0, and the box's own).

    Raises: AnnotationError if it cannot be read, is not COCO JSON, lists no image, or refers to an image or
        category that it does not list.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            data = json.load(file)
    except OSError as error:
        raise AnnotationError(f"cannot read the annotations {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"the annotations {path} are not valid JSON: {error}") from error
    try:
        return _parse(data)
    except _NotCocoError as error:
        raise AnnotationError(f"the annotations {path} are not COCO detection annotations: {error}") from None


class _NotCocoError(Exception):
    """Why a JSON value is not a COCO annotation file."""


def _parse(data: Any) -> CocoGroundTruth:
    if not isinstance(data, dict):
        raise _NotCocoError("the file holds no JSON object")
    try:
        truth = CocoGroundTruth(
            images=tuple(map(_parse_image, _entries(data, "images"))),
            categories=tuple(map(_parse_category, _entries(data, "categories"))),
            annotations=tuple(map(_parse_annotation, _entries(data, "annotations"))),
        )
    except KeyError as error:
        raise _NotCocoError(f"an entry has no {error}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise _NotCocoError(f"an entry has a value of the wrong form ({error})") from None

    image_ids = _distinct("image id", [image.id for image in truth.images])
    category_ids = _distinct("category id", [category.id for category in truth.categories])
    _distinct("category name", [category.name for category in truth.categories])
    for annotation in truth.annotations:
        if annotation.image_id not in image_ids:
            raise _NotCocoError(f"an annotation is on image {annotation.image_id}, which is not listed")
        if annotation.category_id not in category_ids:
            raise _NotCocoError(f"an annotation has category {annotation.category_id}, which is not listed")
    return truth


def _entries(data: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = data.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _NotCocoError(f"{key!r} is not a list of objects")
    return entries


def _parse_image(entry: Mapping[str, Any]) -> AnnotatedImage:
    name = entry["file_name"]
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is no file name")
    height, width = _whole(entry["height"]), _whole(entry["width"])
    return AnnotatedImage(id=_whole(entry["id"]), file_name=name, height=height, width=width)


def _parse_category(entry: Mapping[str, Any]) -> Category:
    return Category(id=_whole(entry["id"]), name=str(entry["name"]))


def _parse_annotation(entry: Mapping[str, Any]) -> Annotation:
    x, y, width, height = map(finite_number, entry["bbox"])
    if width < 0 or height < 0:
        raise ValueError(f"{entry['bbox']} is no box x, y, width, height")
    return Annotation(
        image_id=_whole(entry["image_id"]),
        category_id=_whole(entry["category_id"]),
        bbox=(x, y, width, height),
        area=finite_number(entry.get("area", width * height)),
        iscrowd=_is_set(entry.get("iscrowd", 0)),
    )


def _whole(value: Any) -> int:
    """Ids may be text of digits, as some data sets have them."""
    return int(value) if isinstance(value, str) else whole_number(value)


def _is_set(value: Any) -> bool:
    """A flag; as text of digits too, of which none is false to Python."""
    return bool(int(value) if isinstance(value, str) else value)


def _distinct(what: str, values: Sequence[Any]) -> set[Any]:
    if not values:
        raise _NotCocoError(f"no {what} is listed")
    if len(set(values)) != len(values):
        twice = next(value for value, count in Counter(values).items() if count > 1)
        raise _NotCocoError(f"the {what} {twice!r} is used twice")
    return set(values)
