"""Stage by stage against torchvision: sizes, pixels, pyramid, anchors, proposals, RoI features, detections.

Each stage is given torchvision's own input to it, so that a fault shows where it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import Tensor

from fpn_engine.backends import TrunkOutput
from fpn_engine.pipeline import Pipeline, Proposals
from fpn_engine.resizing import padded_size, resized_size
from fpn_engine.tasks import OK, Thresholds
from fpn_export.onnx_export import trunk_outputs
from fpn_kernels import decode_proposals, make_base_anchors, select_topk
from tests.export.models import relative_error
from tests.parity.random_detector import make_picture
from tests.parity.subject import Arrays, Subject, open_session, preprocess_together, random_subject, run_onnx
from tests.parity.torchvision_oracle import Comparison, Found, Oracle, Pixels, Stages

# Photographs at 800/1333 and pictures at 160/256 with odd sides, portrait and 1:3.
CROPS = {"portrait": (3, 5, 477, 301), "wide": (17, 9, 211, 633)}
PICTURES = {"picture": (97, 131), "tall_picture": (303, 101)}
INNER = ["proposals", "proposal_scores", "roi_slots", "roi_features", "class_logits", "box_deltas"]


@dataclass
class Case:
    """One image of one detector, and torchvision's way through it."""

    subject: Subject
    oracle: Oracle
    image: Pixels
    session: object

    @cached_property
    def stages(self) -> Stages:
        return self.oracle.stages(self.image)

    @property
    def image_sizes(self) -> Tensor:
        return torch.tensor(self.stages.images.image_sizes, dtype=torch.int64)

    @property
    def padded(self) -> tuple[int, int]:
        h, w = self.stages.images.tensors.shape[-2:]
        return h, w

    @property
    def trunk_output(self) -> TrunkOutput:
        """torchvision's answers in our form."""
        stages = self.stages
        return TrunkOutput(tuple(stages.features.values()), tuple(stages.objectness), tuple(stages.deltas))

    @property
    def proposals(self) -> Proposals:
        """torchvision's proposals in our form."""
        boxes, scores, _ = (torch.from_numpy(values)[None] for values in self.stages.proposals)
        return Proposals(boxes, scores, torch.tensor([scores.shape[1]]))

    @cached_property
    def file_outputs(self) -> Arrays:
        """What the ONNX file makes of torchvision's batch, inside and out."""
        return run_onnx(self.session, self.stages.images.tensors, self.stages.images.image_sizes)


def looking_inside(subject: Subject) -> object:
    return open_session(subject.onnx_model, [*trunk_outputs(subject.spec), *INNER])


@pytest.fixture(scope="module", params=[*PICTURES, *(pytest.param(name, marks=pytest.mark.shared) for name in CROPS)])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    if request.param in PICTURES:
        subject = random_subject("resnet18")
        yield Case(subject, subject.oracle(), make_picture(*PICTURES[request.param]), looking_inside(subject))
        return
    subject = request.getfixturevalue("bccd")
    photograph = next(iter(request.getfixturevalue("photographs").values()))
    top, left, height, width = CROPS[request.param]
    image = np.ascontiguousarray(photograph[top : top + height, left : left + width])
    yield Case(subject, subject.oracle(min_size=800, max_size=1333), image, looking_inside(subject))


def test_resized_size_and_pixels(case: Case) -> None:
    transform = case.oracle.model.transform
    spec = case.subject.engine(min_size=transform.min_size[0], max_size=transform.max_size).spec
    (size,) = case.stages.images.image_sizes
    assert resized_size(*case.image.shape[:2], spec.min_size, spec.max_size) == size
    assert padded_size(size) == case.padded
    batch, image_sizes = preprocess_together([case.image], spec)
    assert image_sizes.tolist() == [list(size)]
    torch.testing.assert_close(batch, case.stages.images.tensors, rtol=0, atol=1e-5)


def test_trunk(case: Case) -> None:
    with torch.inference_mode():
        actual = case.subject.model.trunk(case.stages.images.tensors)
    for ours, theirs in zip(actual, case.trunk_output, strict=True):
        assert len(ours) == len(theirs) == 5
        assert max(map(relative_error, ours, theirs)) < 1e-4


def test_trunk_of_the_file(case: Case) -> None:
    outputs = {name: torch.from_numpy(case.file_outputs[name]) for name in trunk_outputs(case.subject.spec)}
    with torch.inference_mode():
        stages, _ = case.subject.model.pyramid(case.stages.images.tensors)
    theirs = [*stages, *case.trunk_output.features, *case.trunk_output.objectness, *case.trunk_output.deltas]
    for (name, ours), expected in zip(outputs.items(), theirs, strict=True):
        assert relative_error(ours, expected) < 1e-4, name


def test_anchors(case: Case) -> None:
    """Deltas of zero give the anchors back; clipped to the padded batch, so that its whole grid counts."""
    spec, out = case.subject.spec, case.trunk_output
    everything = max(level.shape[1:].numel() for level in out.objectness)
    logits, indices, levels = select_topk(out.objectness, everything)
    base = torch.stack([make_base_anchors(sizes, spec.aspect_ratios) for sizes in spec.anchor_sizes])
    zeros = [torch.zeros_like(deltas) for deltas in out.deltas]
    whole = torch.tensor([case.padded])
    boxes, scores = decode_proposals(logits, indices, zeros, base, case.padded, whole, k=everything)
    counts = [level.shape[1:].numel() for level in out.objectness]
    assert boxes.shape[1] == sum(counts) == len(case.stages.anchors)
    starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
    h, w = case.padded
    clipped = case.stages.anchors.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
    expected = clipped[indices[0] + starts[levels]]
    inside = scores[0] > -torch.inf
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(boxes[0, inside], expected[inside], rtol=0, atol=1e-3)
    assert not ((expected[~inside, 2:] - expected[~inside, :2]) >= 1e-3).all(dim=1).any()


def test_proposals_as_a_set(case: Case) -> None:
    actual = case.subject.model.pipeline.propose(case.trunk_output, case.padded, case.image_sizes)
    n = int(actual.counts[0])
    ours = Found(actual.boxes[0, :n].numpy(), actual.scores[0, :n].numpy(), np.ones(n, np.int64))
    assert_proposals(case, ours, corner_tolerance=1e-3, score_tolerance=1e-5)
    assert (actual.scores[0, :n].diff() <= 0).all()


def test_proposals_of_the_file(case: Case) -> None:
    """From the pixels on, hence with the rounding of the trunk."""
    outputs = case.file_outputs
    real = outputs["proposal_scores"][0] >= 0
    ours = Found(outputs["proposals"][0, real], outputs["proposal_scores"][0, real], np.ones(real.sum(), np.int64))
    assert_proposals(case, ours, corner_tolerance=0.1, score_tolerance=1e-3)


def assert_proposals(case: Case, ours: Found, *, corner_tolerance: float, score_tolerance: float) -> None:
    theirs = case.stages.proposals
    assert len(theirs.scores) > 200
    comparison = Comparison()
    comparison.assert_twins(
        ours,
        theirs,
        case.oracle.wavering_proposals(case.image),
        corner_tolerance=corner_tolerance,
        score_tolerance=score_tolerance,
    )
    assert comparison.tied <= 0.01 * comparison.found


def test_roi_features(case: Case) -> None:
    """The pipeline hands its head torchvision's RoI features, given torchvision's pyramid and proposals."""
    seen: list[Tensor] = []

    def head(roi_features: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(roi_features)
        return case.stages.class_logits, case.stages.box_deltas

    pipeline = Pipeline(case.subject.spec, case.subject.model.trunk, head)
    pipeline.classify(case.trunk_output, case.proposals, case.image_sizes, Thresholds.of(case.subject.spec))
    (roi_features,) = seen
    assert relative_error(roi_features, case.stages.roi_features) < 1e-5
    assert case.stages.roi_features.abs().max() > 0.1


def test_roi_features_and_head_of_the_file(case: Case) -> None:
    """The file's own proposals, pooled and classified by torchvision from its own pyramid."""
    outputs = case.file_outputs
    slots = outputs["roi_slots"]
    assert len(slots) == (outputs["proposal_scores"] >= 0).sum() == len(set(slots.tolist()))
    rois = [torch.from_numpy(outputs["proposals"].reshape(-1, 4)[slots])]
    heads = case.oracle.model.roi_heads
    with torch.inference_mode():
        expected = heads.box_roi_pool(case.stages.features, rois, case.stages.images.image_sizes)
        logits, deltas = heads.box_predictor(heads.box_head(expected))
    assert relative_error(torch.from_numpy(outputs["roi_features"]), expected) < 1e-4
    assert relative_error(torch.from_numpy(outputs["class_logits"]), logits) < 1e-4
    assert relative_error(torch.from_numpy(outputs["box_deltas"]), deltas) < 1e-4


def test_detections(case: Case) -> None:
    """From torchvision's logits and deltas: the same detections in the same order."""
    stages = case.stages
    pipeline = Pipeline(
        case.subject.spec, case.subject.model.trunk, lambda features: (stages.class_logits, stages.box_deltas)
    )
    thresholds = Thresholds.of(case.subject.spec)
    actual = pipeline.classify(case.trunk_output, case.proposals, case.image_sizes, thresholds)
    n = len(stages.detections.scores)
    assert n > 5
    assert actual.counts.tolist() == [n]
    assert actual.status.tolist() == [OK]
    np.testing.assert_allclose(actual.boxes[0, :n].numpy(), stages.detections.boxes, rtol=0, atol=1e-3)
    np.testing.assert_allclose(actual.scores[0, :n].numpy(), stages.detections.scores, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(actual.labels[0, :n].numpy(), stages.detections.labels)
    for padding in (actual.boxes[0, n:], actual.scores[0, n:], actual.labels[0, n:]):
        assert not padding.any()


def test_the_stages_are_torchvisions_own(case: Case) -> None:
    """The oracle taken apart says what it says in one piece."""
    whole = case.oracle.detect(case.image)
    (resized,) = case.stages.images.image_sizes
    h, w = (np.float32(side) / np.float32(new) for side, new in zip(case.image.shape[:2], resized, strict=True))
    np.testing.assert_allclose(case.stages.detections.boxes * [w, h, w, h], whole.boxes, rtol=1e-6)
    np.testing.assert_array_equal(case.stages.detections.labels, whole.labels)
