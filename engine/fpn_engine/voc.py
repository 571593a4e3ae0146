"""Pascal VOC annotations (Everingham et al. 2010, sec. 2 and the devkit): a folder of XML files, one for each image.

VOC counts pixels from 1 and both corners are inside the box, so that its (xmin, ymin, xmax, ymax) is our half-open
(xmin - 1, ymin - 1, xmax, ymax).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple
from xml.etree import ElementTree

from fpn_engine.errors import AnnotationError
from fpn_engine.ground_truth import AnnotatedImage, Annotation, CocoGroundTruth
from fpn_engine.sources import SUFFIXES
from fpn_engine.spec import Category

# In the devkit's order, from id 1.
VOC_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
ANNOTATIONS, IMAGES = "Annotations", "JPEGImages"
MAX_BYTES = 4 << 20  # of one XML file; VOC's own have a few thousand


class _Object(NamedTuple):
    """Box as x, y, width, height in pixels from 0."""

    name: str
    bbox: tuple[float, float, float, float]
    difficult: bool


class _Image(NamedTuple):
    file_name: str
    height: int
    width: int
    objects: list[_Object]


def is_voc(path: str | Path) -> bool:
    """Whether ``path`` is a folder or a list of names, which COCO annotations never are."""
    return os.path.isdir(path) or Path(path).suffix == ".txt"


def load_voc(path: str | Path) -> CocoGroundTruth:
    """Read VOC annotations.

    Objects marked difficult are kept as crowds: finding them is neither right nor wrong. Truncated ones count as any
    other. Boxes are cut to the image. An image has the name of its XML file, as in the devkit, and the suffix that
    ``filename`` gives, else .jpg; its id is that name where all are numbers, else its place in the order. Categories
    have VOC's ids where all names are VOC's, else alphabetical ones from 1; they are those of the whole folder, so
    that two lists of names of one folder agree.

    Args:
        path: a folder with XML files in ``Annotations`` or in itself, for all its images in the order of their names;
            or a .txt file with one name a line, as in ``ImageSets/Main``, anywhere below such a folder.
    Raises: AnnotationError, naming the file, for what cannot be read, is not VOC's XML, or is listed and not there.
    """
    path = Path(path)
    root = _find_root(path)
    images = {file.stem: _read_image(file) for file in _list_files(root)}
    names = list(images) if path.is_dir() else _read_list(path, images)
    categories = _number_categories({thing.name for image in images.values() for thing in image.objects})
    if not categories:
        raise AnnotationError(f"the annotations in {root} hold no object")
    ids = {category.name: category.id for category in categories}
    image_ids = _number_images(names)
    return CocoGroundTruth(
        images=tuple(
            AnnotatedImage(id=image_ids[name], file_name=image.file_name, height=image.height, width=image.width)
            for name, image in ((name, images[name]) for name in names)
        ),
        categories=categories,
        annotations=tuple(
            Annotation(
                image_id=image_ids[name],
                category_id=ids[thing.name],
                bbox=thing.bbox,
                area=thing.bbox[2] * thing.bbox[3],
                iscrowd=thing.difficult,
            )
            for name in names
            for thing in images[name].objects
        ),
    )


def find_voc_images(path: str | Path) -> Path:
    """The folder of the images that :func:`load_voc` names: ``JPEGImages``, else where the XML files are."""
    root = _find_root(Path(path))
    return root if (folder := _find_annotations(root)) == root else folder.with_name(IMAGES)


def _find_root(path: Path) -> Path:
    if path.is_dir():
        return path
    if not path.is_file():
        raise AnnotationError(f"there is no folder or list of annotations {path}")
    for parent in path.absolute().parents:
        if (parent / ANNOTATIONS).is_dir():
            return parent
    raise AnnotationError(f"{path} lists names, but no folder above it has a folder {ANNOTATIONS} of VOC's XML files")


def _find_annotations(root: Path) -> Path:
    folder = root / ANNOTATIONS
    return folder if folder.is_dir() else root


def _list_files(root: Path) -> list[Path]:
    folder = _find_annotations(root)
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".xml" and not file.name.startswith("."))
    except OSError as error:
        raise AnnotationError(f"cannot list the annotations in {folder}: {error.strerror}") from None
    if not files:
        raise AnnotationError(f"{folder} holds no XML files; give a folder of VOC annotations or a COCO JSON file")
    return files


def _read_list(path: Path, images: Mapping[str, _Image]) -> list[str]:
    """The name on each line, or its first word: lists of one class have a second, whether it is in the image."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise AnnotationError(f"cannot read the list {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AnnotationError(f"{path} is not a list of image names, one a line") from None
    lines = [line.strip() for line in lines if line.strip()]
    names = list(dict.fromkeys(line if line in images else line.split()[0] for line in lines))
    if not names:
        raise AnnotationError(f"the list {path} is empty")
    for name in names:
        if name not in images:
            raise AnnotationError(f"{path} lists {name!r}, which has no XML file in {ANNOTATIONS}")
    return names


def _number_images(names: Iterable[str]) -> dict[str, int]:
    listed = list(names)
    numbers = [int(name) for name in listed if name.isascii() and name.isdigit()]
    if len(set(numbers)) < len(listed):
        numbers = list(range(1, len(listed) + 1))
    return dict(zip(listed, numbers, strict=True))


def _number_categories(names: set[str]) -> tuple[Category, ...]:
    order = VOC_NAMES if names <= set(VOC_NAMES) else sorted(names)
    return tuple(Category(id=number, name=name) for number, name in enumerate(order, start=1) if name in names)


class _NotVocError(Exception):
    """Why an XML file is no VOC annotation."""


class _Builder(ElementTree.TreeBuilder):
    """Refuses document types before they are read: they can declare entities that expand without bounds."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise _NotVocError("it has a DOCTYPE, which annotations do not need")


def _read_image(path: Path) -> _Image:
    try:
        if not path.is_file():
            raise _NotVocError("it is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise _NotVocError(f"it has more than {MAX_BYTES >> 20} MiB")
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_Builder()))
        return _parse_image(path.stem, root)
    except OSError as error:
        raise AnnotationError(f"cannot read the annotations {path}: {error.strerror}") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # an unknown encoding is one of the latter
        raise AnnotationError(f"the annotations {path} are not valid XML: {error}") from None
    except _NotVocError as error:
        raise AnnotationError(f"the annotations {path} are not VOC's: {error}") from None


def _parse_image(stem: str, root: ElementTree.Element) -> _Image:
    if root.tag != "annotation":
        raise _NotVocError(f"the file holds <{root.tag}>, not <annotation>")
    suffix = PurePath((root.findtext("filename") or "").strip()).suffix
    width, height = (int(_number(root, f"size/{side}")) for side in ("width", "height"))
    if width < 1 or height < 1:
        raise _NotVocError(f"its size is {width} x {height}")
    return _Image(
        file_name=stem + (suffix if suffix.lower() in SUFFIXES else ".jpg"),
        height=height,
        width=width,
        objects=[_parse_object(thing, width, height) for thing in root.findall("object")],
    )


def _parse_object(thing: ElementTree.Element, width: int, height: int) -> _Object:
    name = (thing.findtext("name") or "").strip()
    if not name:
        raise _NotVocError("an object has no name")
    x1, y1, x2, y2 = (_number(thing, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax"))
    left, top, right, bottom = max(0.0, x1 - 1), max(0.0, y1 - 1), min(x2, width), min(y2, height)
    if not (left < right and top < bottom):
        raise _NotVocError(f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} of its {name} has no pixel inside the image")
    difficult = (thing.findtext("difficult") or "0").strip() == "1"
    return _Object(name=name, bbox=(left, top, right - left, bottom - top), difficult=difficult)


def _number(parent: ElementTree.Element, path: str) -> float:
    text = parent.findtext(path)
    if text is None:
        raise _NotVocError(f"<{parent.tag}> has no {path}")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _NotVocError(f"{path} is {text.strip()!r}, which is no number")
    return number
