"""Sampling, matching and losses of one batch are torchvision's, on the same inputs and random state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fpn_export.scenes import make_scene
from fpn_export.training.step import compute_losses, make_anchors, propose
from fpn_export.training.targets import Objects, assign_anchors, assign_rois
from tests.parity.subject import Subject, random_subject
from tests.parity.torchvision_oracle import Oracle

TOLERANCE = 1e-5
NAMES = {
    "loss_objectness": ("rpn", "classification"),
    "loss_rpn_box_reg": ("rpn", "box"),
    "loss_classifier": ("box_head", "classification"),
    "loss_box_reg": ("box_head", "box"),
}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return random_subject("resnet18")


@pytest.fixture(scope="module")
def oracle(subject: Subject) -> Oracle:
    """torchvision's model in training mode, but for the batch norms."""
    oracle = subject.oracle()
    oracle.model.train()
    oracle.model.transform.torch_choice = lambda sizes: sizes[0]  # it would draw a size from the same random numbers
    for module in oracle.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return oracle


def make_batch(
    oracle: Oracle, *, empty: bool = False
) -> tuple[Tensor, Tensor, list[Objects], list[Tensor], list[dict]]:
    """Two scenes as torchvision's transform leaves them, and as torchvision takes them."""
    images, targets = [], []
    for index in range(2):
        scene = make_scene(11, index, (120, 160))
        keep = slice(0, 0) if empty and index == 1 else slice(None)
        images.append(torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255)
        labels = torch.from_numpy(scene.labels) % 5 + 1
        targets.append({"boxes": torch.from_numpy(scene.boxes)[keep], "labels": labels[keep]})
    resized, resized_targets = oracle.model.transform(images, [dict(target) for target in targets])
    objects = [Objects(target["boxes"], target["labels"]) for target in resized_targets]
    return resized.tensors, torch.tensor(resized.image_sizes), objects, images, targets


def share_proposals(
    subject: Subject, oracle: Oracle, images: Tensor, image_sizes: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let both draw from the same proposals: where two scores are equal but for rounding, their order is anyone's."""
    proposals = propose(subject.model, subject.model.trunk(images), images.shape[-2:], image_sizes)
    monkeypatch.setattr(oracle.model.rpn, "filter_proposals", lambda *given: (list(proposals), None))


@pytest.mark.parametrize("empty", [False, True], ids=["objects", "one image without"])
def test_the_losses_of_a_batch(subject: Subject, oracle: Oracle, empty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images, image_sizes, objects, originals, targets = make_batch(oracle, empty=empty)
    share_proposals(subject, oracle, images, image_sizes, monkeypatch)
    torch.manual_seed(5)
    theirs = oracle.model(originals, targets)
    torch.manual_seed(5)
    ours = compute_losses(subject.model, images, image_sizes, objects)
    for name, (head, part) in NAMES.items():
        expected = theirs[name].item()
        assert expected > 0.01, name
        assert getattr(ours[head], part).item() == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), name


def test_the_gradients_of_a_batch(subject: Subject, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    images, image_sizes, objects, originals, targets = make_batch(oracle)
    share_proposals(subject, oracle, images, image_sizes, monkeypatch)
    torch.manual_seed(5)
    sum(oracle.model(originals, targets).values()).backward()
    torch.manual_seed(5)
    losses = compute_losses(subject.model, images, image_sizes, objects)
    weights = dict(subject.model.named_parameters())
    gradients = torch.autograd.grad(sum(part for loss in losses.values() for part in loss), list(weights.values()))
    ours = dict(zip(weights, gradients, strict=True))
    theirs = {name: weight.grad for name, weight in oracle.model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_anchors_and_their_targets(subject: Subject, oracle: Oracle) -> None:
    images, _, objects, _, _ = make_batch(oracle)
    features = list(oracle.model.backbone(images).values())
    stages = oracle.model.transform(list(images), None)[0]
    expected = oracle.model.rpn.anchor_generator(type(stages)(images, [images.shape[-2:]] * 2), features)
    anchors = make_anchors(subject.spec, [level.shape[-2:] for level in features], images.shape[-2:])
    assert torch.equal(anchors, expected[0])

    rows = [{"boxes": image.boxes, "labels": image.labels} for image in objects]
    labels, matched = oracle.model.rpn.assign_targets_to_anchors(expected, rows)
    torch.manual_seed(3)
    positives, negatives = oracle.model.rpn.fg_bg_sampler(labels)
    torch.manual_seed(3)
    ours = assign_anchors(anchors, objects)
    assert torch.equal(ours.positives, torch.cat(positives).nonzero()[:, 0])
    assert torch.equal(ours.negatives, torch.cat(negatives).nonzero()[:, 0])
    deltas = torch.cat(oracle.model.rpn.box_coder.encode(matched, expected))[ours.positives]
    torch.testing.assert_close(ours.deltas, deltas, rtol=TOLERANCE, atol=TOLERANCE)


def test_rois_and_their_targets(subject: Subject, oracle: Oracle) -> None:
    _, image_sizes, objects, _, _ = make_batch(oracle)
    generator = torch.Generator().manual_seed(2)
    proposals = []
    for (h, w), image in zip(image_sizes.tolist(), objects, strict=True):
        corners = torch.rand(700, 2, 2, generator=generator) * torch.tensor([w, h])
        near = image.boxes.repeat(20, 1) + 6 * torch.randn(20 * len(image.boxes), 4, generator=generator)
        proposals.append(torch.cat([torch.cat([corners.amin(1), corners.amax(1) + 1], dim=1), near]))
    rows = [{"boxes": image.boxes, "labels": image.labels} for image in objects]
    torch.manual_seed(4)
    rois, _, labels, deltas = oracle.model.roi_heads.select_training_samples(list(proposals), rows)
    torch.manual_seed(4)
    ours = assign_rois(proposals, objects, subject.spec.bbox_reg_weights)
    assert torch.equal(ours.rois[:, 1:], torch.cat(rois))
    assert torch.equal(ours.rois[:, 0], torch.cat([torch.full((len(r),), float(n)) for n, r in enumerate(rois)]))
    assert torch.equal(ours.labels, torch.cat(labels))
    real = ours.labels > 0
    assert real.sum() > 50
    torch.testing.assert_close(ours.deltas[real], torch.cat(deltas)[real], rtol=TOLERANCE, atol=TOLERANCE)
