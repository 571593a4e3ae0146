"""RoIAlign against torchvision, ONNX RoiAlign and eq. 1 by hand; its gradient."""

import math
from importlib import import_module
from unittest import mock

import pytest
import torch
import torchvision
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from fpn_kernels import assign_levels, multilevel_roi_align, roi_align
from fpn_kernels.roi_align import multilevel_roi_align_reference
from tests.kernels.boxes import REAL_SIZE, make_pyramid, make_rois, random_boxes, seeded
from tests.kernels.onnx_node import run_node

MODULE = import_module("fpn_kernels.roi_align")  # the package's attribute of this name is the function
EPS = torch.finfo(torch.float32).eps
STRIDES = (4, 8, 16, 32)


def assert_close(actual, features, expected):
    """``expected`` is in float64. A sample's position, up to 400 cells, is off by an eps of it, which moves the value
    by that part of the difference of two neighbours, 2 * largest at most; the low types round weights and result."""
    largest = max(level.abs().amax().item() for level in features)
    tolerance = largest * (2 * 400 * EPS + torch.finfo(actual.dtype).eps)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("aligned", [False, True], ids=["plain", "aligned"])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3, -1])
@pytest.mark.parametrize(
    ("shape", "scale", "size"),
    [((50, 76), 1 / 16, 7), ((13, 19), 1 / 61, 3), ((1, 1), 1 / 32, 7), ((1, 9), 0.25, 1), ((6, 1), 1.0, 2)],
    ids=str,
)
def test_equals_torchvision(shape, scale, size, sampling_ratio, aligned):
    (features,) = make_pyramid(levels=[shape])
    rois = make_rois(40, size=(shape[0] / scale, shape[1] / scale), largest=2 * max(shape) / scale)
    arguments = size, scale, sampling_ratio, aligned
    pooled = roi_align(features, rois, *arguments)
    assert pooled.shape == (80, 4, size, size)
    assert_close(pooled, [features], torchvision.ops.roi_align(features.double(), rois.double(), *arguments))
    listed = roi_align(features, list(rois[:, 1:].split(40)), *arguments)
    assert torch.equal(listed, pooled)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("mode", ["output_half_pixel", "half_pixel"])
def test_equals_onnx(mode, sampling_ratio):
    (features,) = make_pyramid(levels=[(50, 76)])
    rois = make_rois(50)
    onnx = run_node(
        "RoiAlign",
        *(features.numpy(), rois[:, 1:].numpy(), rois[:, 0].long().numpy()),
        opset=20,
        coordinate_transformation_mode=mode,
        **{"output_height": 7, "output_width": 7, "sampling_ratio": sampling_ratio, "spatial_scale": 1 / 16},
    )
    pooled = roi_align(features, rois, 7, 1 / 16, sampling_ratio, mode == "half_pixel")
    assert_close(pooled, [features], torch.from_numpy(onnx[0]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_levels_equal_torchvision_on_a_real_pyramid(dtype):
    features, rois = make_pyramid(dtype=dtype), make_rois(300, largest=1200)
    named = {str(level): feature.double() for level, feature in enumerate(features)}
    pooler = MultiScaleRoIAlign(list(named), 7, 2)
    expected = pooler(named, list(rois[:, 1:].double().split(300)), [REAL_SIZE] * 2)
    assert pooler.scales == [1 / stride for stride in STRIDES]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        pooled = multilevel_roi_align([level.to(memory_format=memory_format) for level in features], rois)
        assert pooled.dtype == dtype
        assert pooled.is_contiguous(memory_format=torch.channels_last)
        assert_close(pooled, features, expected)


@pytest.mark.parametrize(("side", "level"), [(112, 3), (224, 4), (448, 5), (111.99, 2), (223.98, 3), (447.9, 4)])
@pytest.mark.parametrize("shape", [1.0, 0.25, 4.0])
@pytest.mark.parametrize("origin", [0.0, 300.0])
def test_levels_at_their_boundaries(side, level, shape, origin):
    w, h = side * math.sqrt(shape), side / math.sqrt(shape)
    assert assign_levels(torch.tensor([origin, origin, origin + w, origin + h]), 2, 5) == level


def test_levels_equal_torchvision():
    boxes = random_boxes(20_000, largest=3000)
    sides = torch.tensor([112.0, 224.0, 448.0]).repeat_interleave(1000) * (1 + 1e-7 * torch.arange(-1500, 1500))
    boxes = torch.cat([boxes, torch.stack([sides * 0, sides * 0, sides, sides], dim=1)])
    assert torch.equal(assign_levels(boxes, 2, 5), LevelMapper(2, 5)([boxes]) + 2)
    assert torch.equal(assign_levels(boxes, 3, 4, 3, 100), LevelMapper(3, 4, 100, 3)([boxes]) + 3)


def test_levels_of_boxes_without_a_size():
    zero, inverted, endless, unknown = [5, 5, 5, 9], [9, 5, 5, 9], [0, 0, math.inf, math.inf], [math.nan, 0, 1, 1]
    huge = [-3e38, -3e38, 3e38, 3e38]
    assert assign_levels(torch.tensor([zero, inverted, endless, unknown, huge]), 2, 5).tolist() == [2, 2, 5, 2, 5]
    assert assign_levels(torch.zeros(2, 0, 4), 2, 5).shape == (2, 0)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_rois_without_area_are_one_cell_wide(sampling_ratio):
    (features,) = make_pyramid(levels=[(20, 30)])
    empty = torch.tensor([[0.0, 40, 40, 40, 40], [1, 80, 60, 20, 30], [1, 80, 30, 20, 60], [0, 5, 5, 5, 50]])
    pooled = roi_align(features, empty, 7, 0.25, sampling_ratio)
    expected = torchvision.ops.roi_align(features.double(), empty.double(), 7, 0.25, sampling_ratio)
    assert_close(pooled, [features], expected)
    assert pooled.abs().sum() > 0
    assert roi_align(features, empty[1:2], 7, 0.25, 0, aligned=True).count_nonzero() == 0, "no sample in it"


def test_adaptive_sampling_in_parts_is_the_same():
    (features,) = make_pyramid(levels=[(50, 76)])
    rois = make_rois(40, largest=600).repeat(3, 1)
    whole = roi_align(features, rois, 7, 1 / 16)
    with mock.patch.object(MODULE, "TAPS", 1):
        assert torch.equal(roi_align(features, rois, 7, 1 / 16), whole)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_batch_equals_alone(sampling_ratio):
    features, rois = make_pyramid(n=3), make_rois(50, n=3, largest=900)
    together = multilevel_roi_align(features, rois, sampling_ratio=sampling_ratio).split(50)
    for i, some in enumerate(rois.split(50)):
        some = some * torch.tensor([0.0, 1, 1, 1, 1])
        alone = multilevel_roi_align([level[i : i + 1] for level in features], some, sampling_ratio=sampling_ratio)
        assert torch.equal(together[i], alone)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_gradient(sampling_ratio, aligned):
    features = [level.double().requires_grad_() for level in make_pyramid(c=2, levels=[(6, 5), (3, 3), (1, 1)])]
    rois = torch.tensor([[0.0, 1, 2, 15, 19], [1, -3, 0, 150, 130], [1, 0, 0, 230, 300], [0, math.nan, 0, 9, 9]])

    def pool(*levels):
        return multilevel_roi_align_reference(levels, rois, None, 3, (4, 8, 16), sampling_ratio, aligned, 2, 4, 224)

    assert torch.autograd.gradcheck(pool, features)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradient_equals_torchvision(sampling_ratio):
    ours, theirs = make_pyramid(levels=[(50, 76)])[0].requires_grad_(), make_pyramid(levels=[(50, 76)])[0].double()
    rois, weight = make_rois(50), torch.randn(100, 4, 7, 7, generator=seeded())
    (roi_align(ours, rois, 7, 1 / 16, sampling_ratio) * weight).sum().backward()
    theirs.requires_grad_()
    (torchvision.ops.roi_align(theirs, rois.double(), 7, 1 / 16, sampling_ratio) * weight).sum().backward()
    assert_close(ours.grad, [theirs.grad], theirs.grad)
