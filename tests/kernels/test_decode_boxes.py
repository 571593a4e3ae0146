"""Base anchors, box decoding and clipping against torchvision's AnchorGenerator and BoxCoder."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import clip_boxes_to_image

from fpn_kernels import clip_boxes, decode_boxes, make_base_anchors
from tests.kernels.boxes import random_boxes, seeded

RATIOS = (0.5, 1.0, 2.0)


@pytest.mark.parametrize("sizes", [(32,), (512,), (16, 33, 100), (7.5,)], ids=str)
@pytest.mark.parametrize("ratios", [RATIOS, (1.0,), (0.3, 3.7)], ids=str)
def test_base_anchors_equal_torchvision(sizes, ratios):
    assert torch.equal(make_base_anchors(sizes, ratios), AnchorGenerator().generate_anchors(sizes, ratios))


def test_base_anchors_of_the_paper():
    assert make_base_anchors((32,), RATIOS).tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
    assert make_base_anchors((5,), (1.0,)).tolist() == [[-2, -2, 2, 2]], "2.5 rounds to even"


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)], ids=str)
def test_decode_boxes_equals_torchvision(weights):
    anchors, deltas = random_boxes(5000), 3 * torch.randn(5000, 4, generator=seeded())
    assert torch.equal(decode_boxes(anchors, deltas, weights), BoxCoder(weights).decode_single(deltas, anchors))


def test_huge_deltas_are_limited():
    anchor = torch.tensor([0.0, 0.0, 16.0, 32.0])
    for huge in (1e3, 3e38, math.inf):
        grown = decode_boxes(anchor, torch.tensor([0.0, 0.0, huge, huge]))
        torch.testing.assert_close(grown, torch.tensor([-492.0, -984.0, 508.0, 1016.0]))
    assert decode_boxes(anchor, torch.tensor([0.0, 0.0, -1e3, -math.inf])).tolist() == [8, 16, 8, 16]


def test_clip_boxes_equals_torchvision():
    boxes = torch.stack([random_boxes(200, largest=3000, seed=i) for i in range(3)])
    boxes[0, :3] = torch.tensor([[-1e30, -1e30, 1e30, 1e30], [50, 60, 40, 20], [math.nan, 1, math.inf, 1e9]])
    sizes = [(800, 1216), (1, 1), (333, 500)]
    clipped = clip_boxes(boxes, torch.tensor(sizes))
    expected = [clip_boxes_to_image(image, size) for image, size in zip(boxes, sizes, strict=True)]
    torch.testing.assert_close(clipped, torch.stack(expected), rtol=0, atol=0, equal_nan=True)
