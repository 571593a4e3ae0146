"""Fast R-CNN on proposals that the caller gives (sec. 4.2) detects what torchvision's RoI heads detect among them."""

from __future__ import annotations

import dataclasses

import torch

from fpn_engine.pipeline import Proposals
from fpn_export.detector import FastRCNN
from fpn_kernels import clip_boxes
from tests.parity.random_detector import make_picture
from tests.parity.subject import random_subject
from tests.parity.torchvision_oracle import Comparison, Found


def make_proposals(image_size: torch.Tensor, count: int) -> torch.Tensor:
    """(count, 4) boxes of all sizes, clipped to the image."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.rand(count, 2, generator=generator) * image_size.flip(0)
    sides = 8 * 2 ** (5 * torch.rand(count, 2, generator=generator))
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    return clip_boxes(boxes[None], image_size[None])[0]


def test_fast_rcnn_on_given_proposals() -> None:
    subject = random_subject("resnet18")
    oracle = subject.oracle(box_score_thresh=0.01)
    spec = dataclasses.replace(subject.spec, model="fast_rcnn", box_score_thresh=0.01)
    model = FastRCNN(spec, representation_size=subject.representation_size).eval()
    weights = {name: tensor for name, tensor in subject.model.state_dict().items() if not name.startswith("rpn.")}
    model.load_state_dict(weights)

    images = oracle.resized(make_picture(140, 190, seed=11))
    image_sizes = torch.tensor(images.image_sizes)
    boxes = make_proposals(image_sizes[0], 400)
    slots = torch.cat([boxes, torch.full((100, 4), 50.0)])  # those behind the count are not looked at
    proposals = Proposals(slots[None], torch.ones(1, 500), torch.tensor([400]))
    with torch.inference_mode():
        found = model(images.tensors, image_sizes, proposals)
        features = oracle.model.backbone(images.tensors)
        (theirs,), _ = oracle.model.roi_heads(features, [boxes], images.image_sizes)

    n = int(found.counts[0])
    ours = Found(*(values[0, :n].numpy() for values in (found.boxes, found.scores, found.labels)))
    comparison = Comparison()
    comparison.assert_twins(ours, Found(*(theirs[name].numpy() for name in Found._fields)), iter(()))
    assert comparison.found >= 20
    assert comparison.tied == 0
