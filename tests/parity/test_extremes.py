"""The plan where little or nothing is there: one pixel, no proposals, no detections."""

from __future__ import annotations

import numpy as np
import pytest

from fpn_engine.detections import Detections
from fpn_engine.errors import NonFiniteError
from fpn_engine.plan import Plan
from tests.parity.random_detector import make_picture
from tests.parity.subject import Subject, random_subject
from tests.parity.torchvision_oracle import Found


@pytest.fixture(scope="module")
def subject() -> Subject:
    return random_subject("resnet18")


def assert_well_formed(detections: Detections, height: int, width: int) -> None:
    n = len(detections)
    assert detections.image_size == (height, width)
    assert (detections.boxes.shape, detections.boxes.dtype) == ((n, 4), np.float32)
    assert (detections.scores.shape, detections.scores.dtype) == ((n,), np.float32)
    assert (detections.labels.shape, detections.labels.dtype) == ((n,), np.int64)
    assert np.isfinite(detections.boxes).all()
    assert (detections.boxes >= 0).all()
    limits = np.array([width, height, width, height])
    assert (detections.boxes <= limits * (1 + 1e-6)).all()
    assert ((detections.scores > 0.05) & (detections.scores <= 1)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 3), (31, 33), (1, 2)])
def test_images_of_almost_no_pixels(subject: Subject, size: tuple[int, int]) -> None:
    """A side that the size rule would round to nothing stays one pixel; torchvision raises there."""
    (found,) = subject.engine()(make_picture(*size))
    assert_well_formed(found, *size)


def test_tiny_among_ordinary_images(subject: Subject) -> None:
    images = [make_picture(120, 160), make_picture(1, 4000), make_picture(120, 160, 1), make_picture(1, 1)]
    together = subject.engine(batch_size=4)(images)
    engine = subject.engine()
    for image, found in zip(images, together, strict=True):
        (expected,) = engine(image)
        np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(found.labels, expected.labels)


def test_no_proposals(subject: Subject) -> None:
    """Everything below the RPN's threshold: the head runs on no RoI at all."""
    engine = subject.engine(batch_size=2, rpn_score_thresh=1.0)
    images = [make_picture(120, 160), make_picture(97, 131), make_picture(160, 120)]
    for image, found, proposals in zip(images, engine(images), engine.propose(images), strict=True):
        assert len(found) == 0
        assert_well_formed(found, *image.shape[:2])
        assert proposals.boxes.shape == (0, 4)
        assert proposals.scores.shape == (0,)


def test_proposals_in_one_image_of_the_batch_only(subject: Subject) -> None:
    """A threshold between the best objectness of two images leaves one of them without proposals."""
    images = [make_picture(120, 160), make_picture(97, 131)]
    best = [float(proposals.scores[0]) for proposals in subject.engine().propose(images)]
    assert best[0] != best[1]
    engine = subject.engine(batch_size=2, rpn_score_thresh=sum(best) / 2)
    together = engine(images)
    assert [len(proposals.scores) > 0 for proposals in engine.propose(images)] == [b == max(best) for b in best]
    for image, found in zip(images, together, strict=True):
        np.testing.assert_allclose(found.boxes, engine(image)[0].boxes, rtol=0, atol=1e-3)


def test_nothing_above_the_threshold(subject: Subject) -> None:
    for found in subject.engine(batch_size=2)([make_picture(120, 160), make_picture(97, 131)], score_threshold=1.0):
        assert len(found) == 0
        assert found.to_dict()["detections"] == []


def test_no_images(subject: Subject) -> None:
    engine = subject.engine()
    assert engine([]) == []
    assert engine.propose([]) == []
    assert list(engine.stream([])) == []


@pytest.mark.parametrize(
    "thresholds",
    [
        {"score_threshold": 0.5},
        {"nms_threshold": 0.2},
        {"max_detections": 7},
        {"score_threshold": 0.0, "nms_threshold": 1.0},
    ],
)
def test_thresholds_do_what_torchvisions_do(subject: Subject, thresholds: dict[str, float]) -> None:
    names = {
        "score_threshold": "box_score_thresh",
        "nms_threshold": "box_nms_thresh",
        "max_detections": "box_detections_per_img",
    }
    image = make_picture(120, 160)
    (found,) = subject.engine()(image, **thresholds)
    expected = subject.oracle(**{names[name]: value for name, value in thresholds.items()}).detect(image)
    assert len(found) == len(expected.scores) > 0
    ours = Found.of(found)
    np.testing.assert_allclose(ours.scores, expected.scores, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.boxes, expected.boxes, rtol=0, atol=0.1)


@pytest.mark.parametrize("part", ["trunk.onnx", "head.onnx"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_an_error(subject: Subject, part: str, value: float) -> None:
    """Never an empty list, which would read as "nothing there"."""
    from onnx import ModelProto, numpy_helper

    from fpn_engine.engine import Engine

    model = ModelProto.FromString(subject.plan.parts[part])
    weight = max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    array = numpy_helper.to_array(weight).copy()
    array.reshape(-1)[:: max(1, array.size // 97)] = value
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    engine = Engine.from_plan(Plan(subject.plan.manifest, {**subject.plan.parts, part: model.SerializeToString()}))
    with pytest.raises(NonFiniteError, match="image 0: the network gave NaN or infinity"):
        engine(make_picture(120, 160))
    (outcome,) = engine.stream(["a.png"], read=lambda path: make_picture(120, 160))
    assert isinstance(outcome.result, NonFiniteError)
