"""The trained detector finds in real photographs what torchvision finds with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fpn_engine.annotations import CocoGroundTruth
from fpn_engine.evaluation import DetectionScore, score_detections
from tests.parity.subject import Subject, found_in, run_onnx
from tests.parity.torchvision_oracle import Comparison, Found, Oracle, Pixels, as_results

pytestmark = pytest.mark.shared

FORMS = ("plan", "light", "onnx")
# (photograph, top, left, height, width): odd sides, portrait, and 1:3 both ways.
CROPS = [(0, 0, 0, 411, 333), (1, 3, 5, 477, 301), (2, 17, 9, 211, 633), (3, 0, 101, 480, 160), (4, 1, 1, 377, 639)]
Answers = dict[int, Found]
Detect = Callable[[Pixels], Found]


def detect_with(form: str, subject: Subject, oracle: Oracle) -> Detect:
    """The plan on the pixels, with torch or without, or ONNX Runtime alone on what torchvision makes of them."""
    make_engine = subject.light_engine if form == "light" else subject.engine
    engine = make_engine(min_size=oracle.model.transform.min_size[0], max_size=oracle.model.transform.max_size)

    def run_plan(image: Pixels) -> Found:
        return Found.of(engine(image)[0])

    def run_file(image: Pixels) -> Found:
        images = oracle.resized(image)
        outputs = run_onnx(subject.session, images.tensors, images.image_sizes)
        return found_in(outputs, 0, image.shape[:2], images.image_sizes[0])

    return run_file if form == "onnx" else run_plan


@pytest.fixture(scope="module")
def oracle(bccd: Subject) -> Oracle:
    return bccd.oracle()


@pytest.fixture(scope="module")
def expected(oracle: Oracle, photographs: dict[int, Pixels]) -> Answers:
    return {image_id: oracle.detect(image) for image_id, image in photographs.items()}


@pytest.fixture(scope="module", params=FORMS)
def actual(request: pytest.FixtureRequest, bccd: Subject, oracle: Oracle, photographs: dict[int, Pixels]) -> Answers:
    detect = detect_with(request.param, bccd, oracle)
    return {image_id: detect(image) for image_id, image in photographs.items()}


def test_every_detection_has_its_twin(
    actual: Answers, expected: Answers, oracle: Oracle, photographs: dict[int, Pixels]
) -> None:
    assert len(photographs) == 72
    comparison = Comparison()
    for image_id, image in photographs.items():
        comparison.assert_twins(actual[image_id], expected[image_id], oracle.wavering(image), name=f"image {image_id}")
    assert comparison.found > 1000
    assert comparison.tied <= 5, comparison


def test_average_precision_is_torchvisions(
    actual: Answers, expected: Answers, bccd: Subject, bccd_truth: CocoGroundTruth
) -> None:
    ours, theirs = (score(answers, bccd, bccd_truth) for answers in (actual, expected))
    assert theirs.AP > 0.5
    for name, value in theirs.to_dict().items():
        if name != "per_class" and value is not None:
            assert getattr(ours, name) == pytest.approx(value, abs=1e-3), name
    assert ours.per_class == pytest.approx(theirs.per_class, abs=1e-3)


def score(answers: Answers, subject: Subject, truth: CocoGroundTruth) -> DetectionScore:
    ids = [category.id for category in subject.spec.categories]
    results = [result for image_id, found in answers.items() for result in as_results(image_id, found, ids)]
    return score_detections(truth, results)


@pytest.fixture(scope="module")
def large_oracle(bccd: Subject) -> Oracle:
    return bccd.oracle(min_size=800, max_size=1333)


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: f"{crop[3]}x{crop[4]}")
def test_crops_at_800_1333(
    crop: tuple[int, ...], bccd: Subject, large_oracle: Oracle, photographs: dict[int, Pixels]
) -> None:
    """640x480 halved exactly hides rounding faults; these are resized by odd factors."""
    number, top, left, height, width = crop
    photograph = list(photographs.values())[number]
    image = np.ascontiguousarray(photograph[top : top + height, left : left + width])
    theirs = large_oracle.detect(image)
    comparison = Comparison()
    for form in FORMS:
        ours = detect_with(form, bccd, large_oracle)(image)
        comparison.assert_twins(ours, theirs, large_oracle.wavering(image), name=form)
    assert comparison.found >= 2 * 5
    assert comparison.tied <= 2, comparison
