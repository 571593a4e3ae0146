"""Taking what NMS kept, on the device, exactly as the reference does."""

import pytest
import torch

from fpn_kernels.kept import take_detections_reference, take_proposals_reference
from fpn_kernels.triton.kept import launch_take_detections, launch_take_proposals
from tests.kernels.test_kept import make_kept
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_takes(keep, boxes, scores, labels):
    given = [part.to(DEVICE) for part in (keep, boxes, scores, labels)]
    pairs = [*zip(launch_take_detections(*given), take_detections_reference(*given), strict=True)]
    pairs += zip(launch_take_proposals(*given[:3]), take_proposals_reference(*given[:3]), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 9, 6), (3, 50, 33), (2, 3, 100), (2, 0, 3), (0, 4, 2), (2, 4, 0)], ids=str
)
def test_equals_the_reference(shape):
    assert_takes(*make_kept(*shape))


def test_any_order_and_values():
    keep, boxes, scores, labels = make_kept(2, 9, 6)
    keep = torch.tensor([[-1, 8, 8, -1, 0, 3], [2, -1, -1, -1, -1, 0]])
    boxes[0, 8], scores[1, 2], labels[0, 0] = torch.nan, torch.inf, -5
    assert_takes(keep, boxes, scores, labels)


def test_views_are_taken_from():
    keep, boxes, scores, labels = make_kept(2, 9, 6)
    strided = [part.repeat_interleave(2, dim=1)[:, ::2] for part in (keep, boxes, scores)]
    assert_takes(*strided, labels[:1].expand(2, 9))


@pytest.mark.gpu
def test_capturable():
    one, other = make_kept(2, 5000, 1000), make_kept(2, 5000, 1000)
    assert_capturable(launch_take_detections, one, (other[0].flip(1), *other[1:]))
    assert_capturable(launch_take_proposals, one[:3], (other[0].flip(1), *other[1:3]))
