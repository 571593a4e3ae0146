"""Without torch every system finds what it finds with torch: the light runner and the pipeline on the same plan."""

from __future__ import annotations

import numpy as np
import pytest

from fpn_engine.detections import Detections
from tests.export.random_system import make_rois
from tests.parity.random_detector import make_picture
from tests.parity.test_batches import CORNER, SCORE, assert_same
from tests.parity.test_systems import SYSTEMS, subject_of
from tests.parity.torchvision_oracle import Found, match
from tests.threads import one_thread

__all__ = ["one_thread"]

IMAGES = [make_picture(64, 96, 1), make_picture(60, 90, 2), make_picture(97, 41, 3)]
THRESHOLDS: list[dict[str, float]] = [
    {},
    {"score_threshold": 0.3, "nms_threshold": 0.2, "max_detections": 7},
    {"score_threshold": 0.0, "max_detections": 500},
]


@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system(system: str, thresholds: dict[str, float]) -> None:
    subject = subject_of(system)
    given = None
    if not subject.spec.has_rpn:
        rois = make_rois(images=3, size=(60, 41))[:, 1:].view(3, 60, 4).numpy()
        given = [rois[0], rois[1][:25], rois[2][:0]]
    engines = subject.light_engine(batch_size=2), subject.engine(batch_size=2)
    ours, theirs = (engine(IMAGES, proposals=given, **thresholds) for engine in engines)
    assert max(map(len, theirs)) > 3
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.image_size == expected.image_size
        assert_alike(actual, expected)


@pytest.mark.parametrize("system", [name for name in SYSTEMS if subject_of(name).spec.has_rpn])
def test_proposals(system: str) -> None:
    subject = subject_of(system)
    ours, theirs = (engine.propose(IMAGES) for engine in (subject.light_engine(), subject.engine()))
    for actual, expected in zip(ours, theirs, strict=True):
        assert len(expected.scores) > 10
        labels = np.ones(len(expected.scores), dtype=np.int64)
        assert len(actual.scores) == len(expected.scores)
        assert_same(Found(*actual, labels), Found(*expected, labels))


def assert_alike(actual: Detections, expected: Detections) -> None:
    assert len(actual) == len(expected)
    rows, _ = match(Found.of(actual), Found.of(expected), CORNER, SCORE)
    assert len(rows) == len(expected)
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=0, atol=SCORE)
    assert (actual.boxes.dtype, actual.scores.dtype, actual.labels.dtype) == (np.float32, np.float32, np.int64)
