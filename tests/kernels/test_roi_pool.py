"""RoIPool against torchvision, ONNX MaxRoiPool and bins by hand; its gradient."""

import math
from importlib import import_module
from unittest import mock

import pytest
import torch
import torchvision

from fpn_kernels import assign_levels, multilevel_roi_pool, roi_pool
from fpn_kernels.roi_pool import multilevel_roi_pool_reference
from tests.kernels.boxes import make_pyramid, make_rois, seeded
from tests.kernels.onnx_node import run_node

MODULE = import_module("fpn_kernels.roi_pool")  # the package's attribute of this name is the function
STRIDES = (4, 8, 16, 32)


@pytest.mark.parametrize(
    ("shape", "scale", "size"),
    [((50, 76), 1 / 16, 7), ((50, 76), 1 / 16, 14), ((13, 19), 1 / 64, 3), ((1, 1), 1 / 32, 7), ((1, 9), 0.25, 1)],
    ids=str,
)
def test_equals_torchvision(shape, scale, size):
    (features,) = make_pyramid(levels=[shape])
    rois = make_rois(60, size=(shape[0] / scale, shape[1] / scale), largest=2 * max(shape) / scale)
    pooled = roi_pool(features, rois, size, scale)
    assert pooled.shape == (120, 4, size, size)
    assert torch.equal(pooled, torchvision.ops.roi_pool(features, rois, size, scale))
    assert torch.equal(roi_pool(features, list(rois[:, 1:].split(60)), size, scale), pooled)


@pytest.mark.parametrize("corner", [0.0, 0.4999999701976776, 0.5, 1.5, 2.5, -0.5, -1.5, -2.4999998])
def test_corners_round_half_away_from_zero_as_torchvisions_do(corner):
    features = torch.arange(144.0).view(1, 1, 12, 12)
    rois = torch.tensor([[0, corner, corner, 8 + corner, 5 + corner], [0, 3, 3, 3 + corner, 3 + corner]])
    assert torch.equal(roi_pool(features, rois, 3), torchvision.ops.roi_pool(features, rois, 3))


def test_every_size_of_bin_rounds_as_torchvisions():
    """Sizes in cells over bins are no exact floats: ceil(7 * (size / 7)) is not always size."""
    features = torch.randn(1, 1, 60, 60, generator=seeded())
    sides = torch.arange(-3.0, 63).repeat_interleave(66), torch.arange(-3.0, 63).repeat(66)
    rois = torch.stack([torch.zeros(66 * 66), torch.ones(66 * 66), torch.ones(66 * 66), *sides], dim=1)
    for size in (5, 6, 7):
        assert torch.equal(roi_pool(features, rois, size), torchvision.ops.roi_pool(features, rois, size))


def test_by_hand():
    features = torch.arange(20.0).view(1, 1, 4, 5)
    # Cells 1..3 by 0..2 in two bins: 1.5 cells each, so that the middle one is in both.
    shared, outside, point = [1, 0, 3, 2], [-9, 0, -4, 2], [4, 3, 4, 3]
    rois = torch.tensor([[0.0, *shared], [0, *outside], [0, *point]])
    pooled = roi_pool(features, rois, 2)[:, 0]
    assert pooled[0].tolist() == [[7, 8], [12, 13]]
    assert pooled[1].tolist() == [[0, 0], [0, 0]], "no cell of the map"
    assert pooled[2].tolist() == [[19, 19], [19, 19]], "one cell, in every bin"


def test_equals_onnx():
    (features,) = make_pyramid(levels=[(50, 76)])
    rois = torch.cat([make_rois(300, largest=900), torch.tensor([[1, 40, 40, 40, 40], [0, 8.0, 24, 7, 3]])])
    onnx = run_node("MaxRoiPool", features.numpy(), rois.numpy(), opset=20, pooled_shape=[7, 7], spatial_scale=1 / 16)
    assert torch.equal(roi_pool(features, rois, 7, 1 / 16), torch.from_numpy(onnx[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_levels_equal_torchvision_level_by_level(dtype):
    features, rois = make_pyramid(dtype=dtype), make_rois(100, largest=1200)
    levels = assign_levels(rois[:, 1:], 2, 5)
    pooled = multilevel_roi_pool([level.to(memory_format=torch.channels_last) for level in features], rois)
    assert pooled.dtype == dtype
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True), start=2):
        chosen = levels == level
        assert chosen.any()
        expected = torchvision.ops.roi_pool(feature.float(), rois[chosen], 7, 1 / stride)
        assert torch.equal(pooled[chosen].float(), expected)


def test_in_parts_is_the_same():
    (features,) = make_pyramid(levels=[(50, 76)])
    rois = make_rois(40, largest=600)
    whole = roi_pool(features, rois, 7, 1 / 16)
    with mock.patch.object(MODULE, "CELLS", 5):
        assert torch.equal(roi_pool(features, rois, 7, 1 / 16), whole)


def test_batch_equals_alone():
    features, rois = make_pyramid(n=3), make_rois(50, n=3, largest=900)
    together = multilevel_roi_pool(features, rois).split(50)
    for i, some in enumerate(rois.split(50)):
        some = some * torch.tensor([0.0, 1, 1, 1, 1])
        assert torch.equal(together[i], multilevel_roi_pool([level[i : i + 1] for level in features], some))


def test_gradient():
    features = [level.double().requires_grad_() for level in make_pyramid(c=2, levels=[(6, 5), (3, 3), (1, 1)])]
    rois = torch.tensor([[0.0, 1, 2, 15, 19], [1, -3, 0, 150, 130], [1, 0, 0, 230, 300], [0, math.nan, 0, 9, 9]])

    def pool(*levels):
        return multilevel_roi_pool_reference(levels, rois, None, 3, (4, 8, 16), 2, 4, 224)

    assert torch.autograd.gradcheck(pool, features)


@pytest.mark.parametrize("after_relu", [False, True], ids=["", "with ties at 0"])
def test_gradient_equals_torchvision(after_relu):
    (features,) = make_pyramid(levels=[(50, 76)])
    features = features.relu() if after_relu else features
    ours, theirs = features.clone().requires_grad_(), features.double().requires_grad_()
    rois, weight = make_rois(50), torch.randn(100, 4, 7, 7, generator=seeded())
    (roi_pool(ours, rois, 7, 1 / 16) * weight).sum().backward()
    (torchvision.ops.roi_pool(theirs, rois.double(), 7, 1 / 16) * weight).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-6, atol=1e-5)
    assert theirs.grad.count_nonzero() > 1000


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rois_and_empty_slots_give_zeros(bad):
    rois = make_rois(10)
    expected = multilevel_roi_pool(make_pyramid(), rois)
    spoilt = rois.clone()
    for i in range(5):
        spoilt[i, i] = bad
    pooled = multilevel_roi_pool(make_pyramid(), spoilt, torch.tensor([9, 10]))
    assert pooled[:5].count_nonzero() + pooled[9].count_nonzero() == 0
    assert torch.equal(pooled[5:9], expected[5:9])
    assert torch.equal(pooled[10:], expected[10:])


def test_huge_rois_are_bounded():
    far = torch.tensor([[0, -3e38, -3e38, 3e38, 3e38], [1, -1e9, 0, -1e8, 5], [0, 3e38, 3e38, 3.1e38, 3.1e38]])
    (features,) = make_pyramid(c=1, levels=[(8, 8)])
    pooled = roi_pool(features, far, 1)
    assert pooled.flatten().tolist() == [features[0].max().item(), 0, 0]


def test_nothing_to_pool():
    for n in (0, 2):
        pooled = multilevel_roi_pool(make_pyramid(n=n, dtype=torch.float16), torch.zeros(0, 5))
        assert (pooled.shape, pooled.dtype) == ((0, 4, 7, 7), torch.float16)
    assert roi_pool(torch.zeros(0, 4, 5, 5), [], 7).shape == (0, 4, 7, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "at least one level"),
        ({"strides": (4,)}, "one stride per level, not 1 for 2"),
        ({"rois": torch.zeros(6, 4)}, "rois must have shape"),
        ({"rois": torch.tensor([[2.0, 0, 0, 9, 9]])}, "outside the batch of 2"),
        ({"output_size": 0}, "output_size must be at least 1"),
    ],
    ids=str,
)
def test_rejects(change, message):
    valid = {"features": make_pyramid(c=1, levels=[(4, 4), (2, 2)]), "rois": torch.zeros(6, 5), "strides": (4, 8)}
    with pytest.raises(ValueError, match=message):
        multilevel_roi_pool(**valid | change)
