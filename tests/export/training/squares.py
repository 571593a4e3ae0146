"""Coloured rectangles on dark ground: a data set that a tiny detector learns in a minute."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from numpy.random import RandomState
from PIL import Image

from fpn_engine.annotations import AnnotatedImage, Annotation, CocoGroundTruth
from fpn_engine.spec import Category, ModelSpec
from fpn_export.training.examples import Example

SIDE = 96
COLORS = ((220, 60, 40), (40, 200, 80), (60, 90, 230))
CATEGORIES = tuple(Category(id=i, name=name) for i, name in enumerate(("red", "green", "blue"), start=1))


def tiny_spec(**changes: object) -> ModelSpec:
    """A detector small enough to be trained on a CPU while one waits."""
    values = {
        "arch": "resnet18",
        "body_width": 16,
        "fpn_channels": 32,
        "categories": CATEGORIES,
        "min_size": SIDE,
        "max_size": SIDE,
        "anchor_sizes": ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,)),
        "rpn_pre_nms_top_n_test": 200,
        "rpn_post_nms_top_n_test": 200,
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


def make_example(seed: int, index: int) -> Example:
    random = RandomState([seed, index])
    pixels = random.randint(0, 90, (SIDE // 8, SIDE // 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    boxes: list[list[int]] = []
    labels = []
    for _ in range(random.randint(1, 5)):
        w, h = random.randint(20, 45, 2)
        x, y = random.randint(0, SIDE - w), random.randint(0, SIDE - h)
        label = random.randint(3)
        if all(x >= b[2] or x + w <= b[0] or y >= b[3] or y + h <= b[1] for b in boxes):
            pixels[y : y + h, x : x + w] = np.clip(np.array(COLORS[label]) + random.randint(-30, 30, 3), 0, 255)
            boxes.append([x, y, x + w, y + h])
            labels.append(label + 1)
    return Example(pixels, np.array(boxes, np.float32), np.array(labels, np.int64))


class Squares:
    """Examples 0..count-1 of a seed."""

    def __init__(self, seed: int, count: int) -> None:
        self._examples = [make_example(seed, index) for index in range(count)]
        self.shapes = [(SIDE, SIDE)] * count

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    @property
    def truth(self) -> CocoGroundTruth:
        """Image ``index`` has the id ``index + 1``."""
        images = [AnnotatedImage(id=i, file_name=f"{i}.png", height=SIDE, width=SIDE) for i in range(1, len(self) + 1)]
        annotations = []
        for image, example in zip(images, self._examples, strict=True):
            for (x1, y1, x2, y2), label in zip(example.boxes.tolist(), example.labels.tolist(), strict=True):
                bbox = (x1, y1, x2 - x1, y2 - y1)
                area = bbox[2] * bbox[3]
                annotations.append(
                    Annotation(image_id=image.id, category_id=label, bbox=bbox, area=area, iscrowd=False)
                )
        return CocoGroundTruth(images=tuple(images), categories=CATEGORIES, annotations=tuple(annotations))


def write_squares(folder: Path, seed: int, count: int) -> Path:
    """The data set on disk, as ``annotations.json`` and ``images/1.png``...; returns the former's path."""
    squares = Squares(seed, count)
    truth = squares.truth
    (folder / "images").mkdir(parents=True)
    for image, index in zip(truth.images, range(count), strict=True):
        Image.fromarray(squares[index].pixels).save(folder / "images" / image.file_name)
    annotations = [{"id": i, **dataclasses.asdict(a)} for i, a in enumerate(truth.annotations, start=1)]
    document = {
        "images": [dataclasses.asdict(image) for image in truth.images],
        "categories": [dataclasses.asdict(category) for category in CATEGORIES],
        "annotations": annotations,
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(document))
    return path
