"""The result of an image is what it would be alone, whatever else is in the batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fpn_engine.detections import Detections
from tests.parity.random_detector import make_picture
from tests.parity.subject import OUTPUTS, Subject, preprocess_together, random_subject, run_onnx
from tests.parity.torchvision_oracle import Found, match

CORNER, SCORE = 1e-3, 1e-4
SIZES = [(120, 160), (97, 131), (160, 120), (100, 300), (101, 133), (120, 161), (131, 97), (64, 64)]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return random_subject("resnet18")


@pytest.fixture(scope="module")
def alone(subject: Subject) -> list[Detections]:
    engine = subject.engine(batch_size=1)
    return [engine(make_picture(h, w, seed))[0] for seed, (h, w) in enumerate(SIZES)]


def assert_same(actual: Found, expected: Found) -> None:
    """The same detections in the same order but for rounding; a score that close to another's may change places."""
    assert len(actual.scores) == len(expected.scores)
    assert np.abs(actual.scores - expected.scores).max(initial=0) <= SCORE
    rows, _ = match(actual, expected, CORNER, SCORE)
    assert len(rows) == len(expected.scores)


@pytest.mark.parametrize(("batch_size", "order"), [(2, "forward"), (3, "backward"), (4, "shuffled"), (16, "forward")])
def test_plan(subject: Subject, alone: list[Detections], batch_size: int, order: str) -> None:
    indices = list(range(len(SIZES)))
    if order != "forward":
        indices = (
            indices[::-1] if order == "backward" else np.random.default_rng(batch_size).permutation(indices).tolist()
        )
    images = [make_picture(*SIZES[i], i) for i in indices]
    together = subject.engine(batch_size=batch_size)(images)
    for index, detections in zip(indices, together, strict=True):
        assert detections.image_size == SIZES[index]
        assert_same(Found.of(detections), Found.of(alone[index]))


def test_stream_in_windows(subject: Subject, alone: list[Detections]) -> None:
    """Paths stand for images that a reader makes; windows and batches mix them."""
    names = [str(i % len(SIZES)) for i in range(19)]
    outcomes = subject.engine(batch_size=2).stream(names, read=lambda name: make_picture(*SIZES[int(name)], int(name)))
    for name, outcome in zip(names, outcomes, strict=True):
        assert outcome.source == name
        assert isinstance(outcome.result, Detections)
        assert_same(Found.of(outcome.result), Found.of(alone[int(name)]))


def test_proposals(subject: Subject) -> None:
    images = [make_picture(h, w, seed) for seed, (h, w) in enumerate(SIZES)]
    together = subject.engine(batch_size=4).propose(images)
    engine = subject.engine()
    for image, (boxes, scores) in zip(images, together, strict=True):
        (expected,) = engine.propose(image)
        ones = np.ones(len(scores), np.int64)
        assert_same(Found(boxes, scores, ones), Found(*expected, np.ones(len(expected.scores), np.int64)))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_onnx_file(subject: Subject, n: int) -> None:
    """Every row of a batch of the file, at every place in it."""
    images = [make_picture(h, w, seed) for seed, (h, w) in enumerate([(120, 160), (97, 131), (101, 133), (120, 161)])]
    batch, sizes = preprocess_together(images, subject.spec)
    single = [run_onnx(subject.session, batch[i : i + 1], sizes[i : i + 1].tolist()) for i in range(len(images))]
    for rows in itertools.islice(itertools.permutations(range(len(images)), n), 0, None, 7):
        together = run_onnx(subject.session, batch[list(rows)], sizes[list(rows)].tolist())
        for place, index in enumerate(rows):
            actual, expected = (_valid(outputs, row) for outputs, row in ((together, place), (single[index], 0)))
            assert_same(actual, expected)


def _valid(outputs: dict[str, np.ndarray], row: int) -> Found:
    boxes, scores, labels, counts, status = (outputs[name][row] for name in OUTPUTS)
    assert status == 0
    return Found(boxes[:counts], scores[:counts], labels[:counts])


def test_same_input_same_bits(subject: Subject) -> None:
    engine = subject.engine(batch_size=4)
    images = [make_picture(h, w, seed) for seed, (h, w) in enumerate(SIZES)]
    first, *others = (engine(images) for _ in range(3))
    for again in others:
        for a, b in zip(first, again, strict=True):
            assert np.array_equal(a.boxes, b.boxes)
            assert np.array_equal(a.scores, b.scores)
            assert np.array_equal(a.labels, b.labels)
