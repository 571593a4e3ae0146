"""Every system of the paper answers the same as PyTorch module, as ONNX file and as plan."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from fpn_engine.backends.ort import part_names
from fpn_engine.detections import Detections
from fpn_engine.engine import Engine
from fpn_engine.pipeline import Proposals
from fpn_engine.proposals import Boxes
from fpn_engine.tasks import NON_FINITE, PaddedDetections, Thresholds
from tests.export.random_system import REPRESENTATION_SIZE, make_images, make_random_system, make_rois
from tests.parity.random_detector import make_picture
from tests.parity.subject import Arrays, Subject, run_onnx
from tests.parity.torchvision_oracle import Found, Pixels, match
from tests.threads import one_thread

__all__ = ["one_thread"]

# A body that ends at c4, and RoIs that do not begin at the finest level.
SHORT = {"levels": (2, 3, 4), "roi_levels": (3, 4), "anchor_sizes": ((8.0,), (16.0,), (32.0,))}
SYSTEMS = {
    "c4": ("faster_rcnn", {}),
    "c5": ("fast_rcnn", {}),
    "bottom_up": ("faster_rcnn", SHORT),
    "top_down": ("rpn", {}),
    "finest": ("faster_rcnn", {}),
    "unshared": ("rpn", {}),
    "roi_pool": ("fast_rcnn", {}),
}
ENOUGH = 15
SIZES = torch.tensor([(64, 90), (60, 96)])


@cache
def subject_of(system: str) -> Subject:
    model, changes = SYSTEMS[system]
    detector = make_random_system(system, model, **changes)
    return Subject(detector.spec, detector, REPRESENTATION_SIZE)


def given_to(subject: Subject, counts: tuple[int, int] = (60, 40)) -> Proposals | None:
    if subject.spec.has_rpn:
        return None
    return Proposals.given(make_rois()[:, 1:].view(2, 60, 4), torch.tensor(counts))


def run_module(subject: Subject, images: torch.Tensor, **thresholds: float) -> PaddedDetections:
    with torch.inference_mode():
        chosen = Thresholds.of(subject.spec).override(**thresholds)
        return subject.model.pipeline(images, SIZES, chosen, given_to(subject))


def assert_same(actual: Arrays, expected: PaddedDetections) -> None:
    arrays = {name: value.numpy() for name, value in expected._asdict().items()}
    for name, value in arrays.items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype), name
    np.testing.assert_array_equal(actual["counts"], arrays["counts"])
    np.testing.assert_array_equal(actual["status"], arrays["status"])
    for row, count in enumerate(arrays["counts"]):
        assert count >= ENOUGH
        ours, theirs = (
            Found(*(values[name][row, :count] for name in ("boxes", "scores", "labels"))) for values in (actual, arrays)
        )
        assert len(match(ours, theirs, corner_tolerance=1e-2, score_tolerance=1e-4)[0]) == count
        assert (np.diff(ours.scores) <= 0).all()
        for name in ("boxes", "scores", "labels"):
            assert not actual[name][row, count:].any(), "empty slots are zeros"


@pytest.mark.parametrize("system", SYSTEMS)
def test_onnx_file(system: str) -> None:
    subject = subject_of(system)
    images = make_images()
    actual = run_onnx(subject.session, images, SIZES.tolist(), given_to(subject))
    assert_same(actual, run_module(subject, images))
    broken = images.clone()
    broken[1, 0, 5, 5] = torch.nan
    status = run_onnx(subject.session, broken, SIZES.tolist(), given_to(subject))["status"]
    assert status.tolist() == run_module(subject, broken).status.tolist() == [0, NON_FINITE]


@pytest.mark.parametrize("system", ["top_down", "unshared"])
def test_thresholds_of_an_rpn(system: str) -> None:
    subject, images = subject_of(system), make_images()
    expected = run_module(subject, images, box_score_thresh=0.97, box_nms_thresh=0.3, box_detections_per_img=70)
    overrides = {"rpn_score_thresh": 0.97, "rpn_nms_thresh": 0.3, "box_detections_per_img": 70}
    assert_same(run_onnx(subject.session, images, SIZES.tolist(), **overrides), expected)
    assert expected.scores.shape == (2, 70)
    assert expected.scores[0, : int(expected.counts[0])].min() >= 0.97
    assert expected.counts.max() < run_module(subject, images).counts.min() == 60


@pytest.mark.parametrize("system", ["c5", "roi_pool"])
def test_given_proposals_that_are_none_or_no_boxes(system: str) -> None:
    subject, images = subject_of(system), make_images()
    none = Proposals.given(torch.full((2, 1, 4), 9.0), torch.tensor([0, 0]))
    found = run_onnx(subject.session, images, SIZES.tolist(), none)
    assert found["counts"].tolist() == found["status"].tolist() == [0, 0]
    whole = given_to(subject)
    assert whole is not None
    spoilt = whole.boxes.clone()
    spoilt[0, :10, 0], spoilt[1, :10, 3], spoilt[1, 10:20, 2] = torch.nan, torch.inf, -500
    given = Proposals.given(spoilt, whole.counts)
    with torch.inference_mode():
        expected = subject.model(images, SIZES, given)  # type: ignore[arg-type]
    assert_same(run_onnx(subject.session, images, SIZES.tolist(), given), expected)
    whole_found = run_module(subject, images)
    assert not torch.equal(expected.scores[0], whole_found.scores[0]), "those boxes give detections"
    assert not torch.equal(expected.scores[1], whole_found.scores[1])


def pictures() -> list[Pixels]:
    """Two of one padded size, one of another, one very small."""
    return [make_picture(h, w, seed=h) for h, w in [(66, 90), (64, 89), (90, 50), (20, 30)]]


def boxes_for(images: list[Pixels]) -> list[Boxes]:
    """Another number for each."""
    found = []
    for number, image in enumerate(images):
        rois = make_rois(40 + 10 * number, 1, image.shape[:2])
        found.append(rois[:, 1:].numpy())
    return found


def assert_twins(ours: list[Detections], theirs: list[Detections]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b) >= ENOUGH
        assert len(match(Found.of(a), Found.of(b), corner_tolerance=1e-2, score_tolerance=1e-4)[0]) == len(a)


@pytest.mark.parametrize("system", SYSTEMS)
def test_plan(system: str) -> None:
    subject = subject_of(system)
    given = None if subject.spec.has_rpn else boxes_for(pictures())
    expected = Engine(subject.model.pipeline)(pictures(), proposals=given)
    for batch_size in (1, 3):
        assert_twins(subject.engine(batch_size=batch_size)(pictures(), proposals=given), expected)
    assert sorted(subject.plan.parts) == sorted(part_names(subject.spec))


def test_an_rpn_detects_its_proposals() -> None:
    subject = subject_of("top_down")
    engine = subject.engine(box_detections_per_img=25)
    for found, proposed in zip(engine(pictures()), engine.propose(pictures()), strict=True):
        assert len(found) == 25 < len(proposed.scores)
        np.testing.assert_array_equal(found.boxes, proposed.boxes[:25])
        np.testing.assert_array_equal(found.scores, proposed.scores[:25])
        assert set(found.names) == {"object"}


def test_names_in_the_file() -> None:
    """What ``build`` cuts at is called after what it is."""
    names = {value for node in subject_of("c4").onnx_model.graph.node for value in node.output}
    assert {"c2", "c3", "c4", "objectness_c4", "deltas_c4", "roi_features"} <= names
    assert not {"c5", "p4"} & names
    fast = subject_of("roi_pool").onnx_model.graph
    assert [value.name for value in fast.input][:4] == ["image", "image_sizes", "proposals", "proposal_counts"]
    assert not [node for node in fast.node if "objectness" in "".join(node.output)]
    assert sum(node.op_type == "MaxRoiPool" for node in fast.node) == 4
    assert not [node for node in subject_of("top_down").onnx_model.graph.node if "head/" in node.name]
