"""Taking what NMS kept, by the reference."""

import pytest
import torch

import fpn_kernels
from tests.kernels.boxes import random_boxes


def make_kept(n=2, k=9, d=6):
    """keep, at most 4 - image in a row, boxes, scores, labels."""
    boxes = random_boxes(n * k).view(n, k, 4)
    keep = torch.full((n, d), -1, dtype=torch.int64)
    for image in range(n):
        kept = max(min(4 - image, d, k), 0)
        keep[image, :kept] = torch.arange(k - 1, k - 1 - kept, -1)
    return keep, boxes, torch.rand(n, k), torch.arange(n * k).view(n, k)


def by_loop(keep, values):
    taken = values.new_zeros(*keep.shape, *values.shape[2:])
    for image, slot in (keep >= 0).nonzero().tolist():
        taken[image, slot] = values[image, keep[image, slot]]
    return taken


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 6), (3, 5, 1), (2, 3, 12), (2, 0, 3), (0, 4, 2), (2, 4, 0)])
def test_equals_a_loop(shape):
    keep, boxes, scores, labels = make_kept(*shape)
    taken = fpn_kernels.take_detections(keep, boxes, scores, labels)
    for actual, values in zip(taken, (boxes, scores, labels), strict=True):
        assert torch.equal(actual, by_loop(keep, values))
    boxes, scores, rois = fpn_kernels.take_proposals(keep, boxes, scores)
    assert torch.equal(boxes, taken[0])
    assert torch.equal(scores, taken[1])
    image = torch.arange(shape[0]).repeat_interleave(shape[2])
    assert torch.equal(rois, torch.cat([image[:, None].float(), boxes.view(-1, 4)], dim=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": torch.zeros(3, 6, dtype=torch.int64)}, "keep must have shape"),
        ({"keep": torch.zeros(2, 6)}, "keep must be int64"),
        ({"boxes": torch.zeros(2, 9, 5)}, "boxes must have shape"),
        ({"boxes": torch.zeros(2, 9, 4).half()}, "boxes must be float32"),
        ({"scores": torch.zeros(2)}, "scores must have shape"),
        ({"scores": torch.zeros(2, 9).half()}, "scores must be float32"),
        ({"labels": torch.zeros(2, 8, dtype=torch.int64)}, "labels must have shape"),
        ({"labels": torch.zeros(2, 9)}, "labels must be int64"),
    ],
)
def test_wrong_arguments(change, message):
    given = dict(zip(("keep", "boxes", "scores", "labels"), make_kept(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        fpn_kernels.take_detections(**given)
    if "labels" not in change:
        del given["labels"]
        with pytest.raises(ValueError, match=message):
            fpn_kernels.take_proposals(**given)
