"""RoIAlign of RoIs that no image holds, of empty slots, of nothing; what it rejects."""

import math

import pytest
import torch

from fpn_kernels import multilevel_roi_align, roi_align
from tests.kernels.boxes import make_pyramid, make_rois


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rois_give_zeros(bad, sampling_ratio):
    rois = make_rois(10)
    spoilt = rois.clone()
    for i in range(5):
        spoilt[i, i] = bad
    pooled = multilevel_roi_align(make_pyramid(), spoilt, sampling_ratio=sampling_ratio)
    assert pooled[:5].count_nonzero() == 0
    expected = multilevel_roi_align(make_pyramid(), rois, sampling_ratio=sampling_ratio)
    assert torch.equal(pooled[5:], expected[5:])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_huge_rois_are_finite_and_bounded(sampling_ratio, aligned):
    (features,) = make_pyramid(c=1, levels=[(8, 8)])
    far = torch.tensor([[0, -1e30, -1e30, 1e30, 1e30], [1, -1e9, 0, -1e8, 5], [0, 3e38, 3e38, 3.1e38, 3.1e38]])
    far = torch.cat([torch.tensor([[0, -3e38, -3e38, 3e38, 3e38]]), far])
    pooled = roi_align(features, far, 7, 1.0, sampling_ratio, aligned)
    assert pooled.isfinite().all()
    assert pooled[2:].count_nonzero() == 0


def test_adaptive_grid_is_capped():
    tall = torch.tensor([[0.0, 0, 0, 8, 5000]])  # 715 samples a bin by height; 128 are taken, 5.6 cells apart
    pooled = roi_align(torch.ones(1, 1, 8, 8), tall, 7)
    torch.testing.assert_close(pooled[0, 0, 0], torch.full((7,), 1 / 128))  # one of them lies in the map
    assert pooled[0, 0, 1:].count_nonzero() == 0


@pytest.mark.parametrize("index", [-1, 2, 99, 1e8])
def test_an_image_outside_the_batch_is_an_error(index):
    rois = make_rois(3)
    rois[4, 0] = index
    with pytest.raises(ValueError, match="outside the batch of 2"):
        multilevel_roi_align(make_pyramid(), rois)
    with pytest.raises(ValueError, match="outside the batch of 0"):
        multilevel_roi_align(make_pyramid(n=0), rois)
    counts = torch.tensor([3, 1])  # slot 4 is empty, so nobody reads it
    assert multilevel_roi_align(make_pyramid(), rois, counts)[4].count_nonzero() == 0


def test_counts_leave_the_other_slots_zero():
    features, rois = make_pyramid(n=3), make_rois(5, n=3)
    rois[1, 4] = math.nan
    everything = multilevel_roi_align(features, rois).reshape(3, 5, -1)
    counted = multilevel_roi_align(features, rois, torch.tensor([2, 0, 5])).reshape(3, 5, -1)
    assert torch.equal(counted[0, :2], everything[0, :2])
    assert counted[0, 0].count_nonzero() > 0
    assert counted[0, 1].count_nonzero() == 0, "not finite"
    assert torch.equal(counted[2], everything[2])
    assert counted[0, 2:].count_nonzero() + counted[1].count_nonzero() == 0


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_nothing_to_pool(sampling_ratio):
    for n, counts in ((2, None), (2, torch.zeros(2).long()), (0, None), (0, torch.zeros(0).long())):
        features = make_pyramid(n=n, dtype=torch.float16)
        pooled = multilevel_roi_align(features, torch.zeros(0, 5), counts, sampling_ratio=sampling_ratio)
        assert (pooled.shape, pooled.dtype) == ((0, 4, 7, 7), torch.float16)
    assert roi_align(torch.zeros(0, 4, 5, 5), [], 7).shape == (0, 4, 7, 7)
    assert roi_align(torch.zeros(1, 4, 5, 5), [torch.zeros(0, 4)], 7, 1.0, sampling_ratio).shape == (0, 4, 7, 7)


PYRAMID = make_pyramid(c=1, levels=[(4, 4), (2, 2)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "at least one level"),
        ({"features": PYRAMID[:1]}, "one stride per level, not 2 for 1"),
        ({"features": [torch.zeros(3, 4, 4)] * 2}, "features must have shape"),
        ({"features": [PYRAMID[0], torch.zeros(2, 2, 2, 2)]}, "features must have shape"),
        ({"features": [PYRAMID[0], torch.zeros(1, 1, 2, 2)]}, "features must have shape"),
        ({"features": [PYRAMID[0], PYRAMID[1].half()]}, "features must be float32, not float16"),
        ({"features": [level.double() for level in PYRAMID]}, "features must be float32"),
        ({"features": [PYRAMID[0], torch.zeros(2, 1, 0, 2)]}, "features must have cells"),
        ({"rois": torch.zeros(6, 4)}, "rois must have shape"),
        ({"rois": torch.zeros(6, 5).half()}, "rois must be float32"),
        ({"rois": torch.zeros(6, 5, device="meta")}, "one device"),
        ({"counts": torch.zeros(3).long()}, "counts must have shape"),
        ({"rois": torch.zeros(5, 5), "counts": torch.zeros(2).long()}, "5 rois do not divide among 2 images"),
        ({"counts": torch.zeros(2)}, "counts must be int64"),
        ({"counts": torch.zeros(2, device="meta").long()}, "one device"),
        ({"features": [PYRAMID[0], PYRAMID[1].to("meta")]}, "one device"),
        ({"output_size": 0}, "output_size must be at least 1"),
        ({"sampling_ratio": -1}, "sampling_ratio must be 0"),
    ],
    ids=str,
)
def test_rejects(change, message):
    valid = {"features": PYRAMID, "rois": torch.zeros(6, 5), "strides": (4, 8)}
    with pytest.raises(ValueError, match=message):
        multilevel_roi_align(**valid | change)
