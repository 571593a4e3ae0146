"""What was found beside what is there: pairs by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fpn_engine.detections import Detections
from fpn_export.demo import compare
from fpn_export.scenes import CATEGORIES, NAMES, Scene


def make_scene_of(boxes: list[tuple[int, ...]], labels: list[int]) -> Scene:
    count = len(labels)
    return Scene(
        image=np.zeros((100, 100, 3), np.uint8),
        boxes=np.array(boxes, np.float32).reshape(count, 4),
        labels=np.array(labels, np.int64),
        masks=np.zeros((count, 100, 100), bool),
        coverage=np.full(count, 0.25, np.float32),
    )


def detect(*found: tuple[tuple[float, ...], int, float]) -> Detections:
    boxes, labels, scores = zip(*found, strict=True) if found else ((), (), ())
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(len(found), 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        image_size=(100, 100),
        categories=CATEGORIES,
    )


SMALL, LARGE = (0, 0, 10, 10), (20, 20, 60, 60)


def test_each_object_has_one_detection_at_most() -> None:
    scene = make_scene_of([SMALL, LARGE], [1, 2])
    shifted = (20, 20, 60, 50)  # IoU 3/4
    comparison = compare(scene, detect((LARGE, 2, 0.9), (SMALL, 1, 0.8), (shifted, 2, 0.7)))
    assert [(pair.name, pair.width, pair.height, pair.iou) for pair in comparison.pairs] == [
        (NAMES[1], 40, 40, 1.0),
        (NAMES[0], 10, 10, 1.0),
    ]
    assert [pair.score for pair in comparison.pairs] == pytest.approx([0.9, 0.8])
    assert comparison.found == 2
    assert comparison.spurious == [(NAMES[1], pytest.approx(0.7))]
    best_first = compare(scene, detect((shifted, 2, 0.9), (LARGE, 2, 0.7)))
    assert best_first.pairs[0].iou == pytest.approx(0.75)
    assert best_first.spurious == [(NAMES[1], pytest.approx(0.7))]


def test_a_detection_takes_the_object_that_it_overlaps_most() -> None:
    scene = make_scene_of([(0, 0, 10, 8), (0, 0, 10, 10)], [1, 1])
    comparison = compare(scene, detect(((0, 0, 10, 8), 1, 0.9), ((0, 0, 10, 8), 1, 0.8)))
    assert [pair.iou for pair in comparison.pairs] == pytest.approx([0.8, 1.0])
    assert comparison.spurious == []


@pytest.mark.parametrize(
    ("box", "label", "found"), [((0, 0, 10, 5), 1, 1), ((0, 0, 10, 4.9), 1, 0), ((0, 0, 10, 10), 2, 0)]
)
def test_class_and_overlap_must_be_right(box: tuple[float, ...], label: int, found: int) -> None:
    comparison = compare(make_scene_of([SMALL], [1]), detect((box, label, 0.9)))
    assert (comparison.found, len(comparison.spurious)) == (found, 1 - found)


def test_nothing_found_and_nothing_there() -> None:
    assert compare(make_scene_of([SMALL], [1]), detect()).pairs[0].score is None
    nothing = compare(make_scene_of([], []), detect((SMALL, 1, 0.9)))
    assert (nothing.pairs, len(nothing.spurious)) == ([], 1)
