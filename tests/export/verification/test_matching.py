"""Twins, and why there is none: hand-made boxes."""

from __future__ import annotations

import numpy as np
import pytest

from fpn_engine.detections import Detections
from fpn_engine.spec import Category
from fpn_export.verification.matching import Limits, explain, find_gaps, match_boxes, match_detections

CATEGORIES = (Category(id=1, name="cat"), Category(id=3, name="dog"))
LIMITS = Limits(0.05, 0.5, 100)
BOX, WIDER, HALF = (0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 100.0, 94.0), (0.0, 0.0, 100.0, 50.05)


def make(*rows: tuple[tuple[float, float, float, float], float, int]) -> Detections:
    return Detections(
        boxes=np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
        scores=np.array([row[1] for row in rows], np.float32),
        labels=np.array([row[2] for row in rows], np.int64),
        image_size=(100, 100),
        categories=CATEGORIES,
    )


def test_twins() -> None:
    ours = make((BOX, 0.7, 1))
    assert len(match_detections(ours, make((BOX, 0.719, 1))).pairs) == 1
    for other in (make((BOX, 0.721, 1)), make((WIDER, 0.7, 1)), make((BOX, 0.7, 2)), make()):
        matched = match_detections(ours, other)
        assert (len(matched.pairs), matched.only_a, matched.only_b) == (0, [0], list(range(len(other))))


def test_one_to_one() -> None:
    """Two boxes never share a twin, and equal boxes are told apart by their scores."""
    ours, theirs = make((BOX, 0.70, 1), (BOX, 0.69, 1)), make((BOX, 0.69, 1))
    assert match_detections(ours, theirs).pairs.tolist() == [[1, 0]]
    boxes, scores = np.array([BOX, BOX]), np.array([0.3, 0.301], np.float32)
    pairs = match_boxes(boxes, boxes, find_gaps(scores, scores[::-1]), 0.02)
    assert pairs.tolist() == [[0, 1], [1, 0]]
    assert match_boxes(boxes[:0], boxes, np.zeros((0, 2)), 1.0).shape == (0, 2)


@pytest.mark.parametrize(
    ("theirs", "candidates", "limits", "cause", "tie"),
    [
        (make((BOX, 0.6, 1)), make(), LIMITS, "B gives it 0.600", False),
        (make((WIDER, 0.7, 1)), make((BOX, 0.7, 1)), LIMITS, "B's box of it has IoU 0.94", False),
        (
            make((WIDER, 0.7, 1)),
            make((BOX, 0.7, 1), (WIDER, 0.6995, 1)),
            LIMITS,
            "NMS tie: two boxes of the object score the same, and B kept the other",
            True,
        ),
        (make((WIDER, 0.7, 1)), make((BOX, 0.7, 1), (WIDER, 0.698, 1)), LIMITS, "B's box of it has IoU 0.94", False),
        (make((WIDER, 0.7, 1)), make((WIDER, 0.7, 2)), LIMITS, "B's box of it has IoU 0.94", False),
        (make((HALF, 0.9, 1)), make(), LIMITS, "NMS tie: its IoU with a box of B is at the threshold 0.5", True),
        (make(), make(), Limits(0.7005, 0.5, 100), "its score is at the threshold 0.7005", True),
        (make(), make(), Limits(0.8, 0.5, 100), "its score is below B's threshold 0.8", False),
        (make((BOX, 0.9, 2)), make(), Limits(0.05, 0.5, 1), "B has 1 better ones, the most that it reports", False),
        (make((BOX, 0.7, 2)), make(), Limits(0.05, 0.5, 1), "B has 1 better ones, the most that it reports", True),
        (make((BOX, 0.7, 2)), make(), LIMITS, "B has nothing there", False),
        (make(), make(), LIMITS, "B has nothing there", False),
    ],
)
def test_causes(theirs: Detections, candidates: Detections, limits: Limits, cause: str, tie: bool) -> None:
    (lost,) = explain("A", [0], make((BOX, 0.7, 1)), theirs, candidates, limits)
    assert (lost.cause, lost.tie) == (cause, tie)
    assert (lost.side, lost.name, lost.box) == ("A", "cat", BOX)
