"""Painted masks: where colour goes, what lies on top, and which of overlapping masks is seen."""

from __future__ import annotations

import numpy as np
import pytest

from fpn_engine.detections import Detections
from fpn_engine.drawing import category_color
from fpn_engine.masks.painting import choose_apart, paint_masks
from fpn_engine.masks.run_lengths import encode_masks
from fpn_engine.spec import OBJECT

SIZE = (40, 60)


def rectangle(y1: int, x1: int, y2: int, x2: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def make_detections(*masks: np.ndarray) -> Detections:
    return Detections(
        boxes=np.zeros((len(masks), 4), np.float32),
        scores=np.linspace(0.9, 0.5, len(masks), dtype=np.float32),
        labels=np.ones(len(masks), np.int64),
        image_size=SIZE,
        categories=(OBJECT,),
        run_lengths=tuple(encode_masks(np.stack(masks))) if masks else (),
    )


def paint(*masks: np.ndarray) -> np.ndarray:
    return np.asarray(paint_masks(np.full((*SIZE, 3), 100, np.uint8), make_detections(*masks)))


def test_colour_stays_within_the_mask() -> None:
    mask = rectangle(5, 10, 20, 30)
    painted = paint(mask)
    assert (painted[~mask] == 100).all()
    assert (painted[mask] != 100).any(axis=1).all()
    assert painted[5, 10].tolist() == list(category_color(0)), "the edge has the colour itself"
    middle = [round((100 + channel) / 2) for channel in category_color(0)]
    assert np.abs(painted[12, 20].astype(int) - middle).max() <= 1


def test_the_best_is_on_top_of_what_it_overlaps_a_little() -> None:
    first, second = rectangle(0, 0, 20, 20), rectangle(10, 10, 40, 60)
    assert paint(first, second)[19, 15].tolist() == list(category_color(0))
    assert paint(second, first)[19, 15].tolist() != list(category_color(1))


def test_of_masks_of_one_object_the_better_is_seen() -> None:
    mask, nearly = rectangle(5, 10, 20, 30), rectangle(5, 11, 20, 30)
    assert np.array_equal(paint(mask, nearly), paint(mask))
    assert [int(one.sum()) for one in choose_apart(np.stack([mask, nearly, np.zeros(SIZE, bool)]))] == [300]


def test_nothing_to_paint() -> None:
    assert (paint() == 100).all()


def test_another_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image must be"):
        paint_masks(np.zeros((9, 9, 3), np.uint8), make_detections())
