"""RoIPool's kernel against the reference, torchvision and ONNX MaxRoiPool, to the bit; its gradient."""

import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_kernels import multilevel_roi_pool
from fpn_kernels.roi_pool import multilevel_roi_pool_backward_reference, multilevel_roi_pool_reference
from fpn_kernels.triton.roi_pool import launch_multilevel_roi_pool, launch_multilevel_roi_pool_backward
from tests.kernels.boxes import REAL_LEVELS, make_pyramid, make_rois, seeded
from tests.kernels.onnx_node import run_node
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE
from tests.kernels.triton.test_roi_align import FLOATS, SHAPES, STEPS, STRIDES, small_rois

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def form(strides=STRIDES, *, canonical_size=60.0):
    """The arguments that follow the tensors; RoIs of the tests' small maps are spread over all levels."""
    return list(strides), 2, 4, canonical_size


FORM = form()


def launch(features, rois, counts=None, size=2, args=FORM):
    counts = None if counts is None else counts.to(DEVICE)
    pooled = launch_multilevel_roi_pool([level.to(DEVICE) for level in features], rois.to(DEVICE), counts, size, *args)
    assert pooled.dtype == features[0].dtype
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    return pooled.cpu()


def assert_equals_reference(features, rois, counts=None, size=2, args=FORM):
    expected = multilevel_roi_pool_reference(features, rois, counts, size, *args)
    assert torch.equal(launch(features, rois, counts, size, args), expected)
    return expected


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_reference(dtype):
    assert_equals_reference(make_pyramid(c=5, levels=SHAPES, dtype=dtype), small_rois())


@pytest.mark.parametrize("channels", [1, 24, 100, 300])
def test_any_number_of_channels(channels):
    assert_equals_reference(make_pyramid(c=channels, levels=SHAPES), small_rois(2))


@pytest.mark.parametrize("size", [1, 5, 7, 14, 17])
def test_any_number_of_bins(size):
    assert_equals_reference(make_pyramid(levels=SHAPES), small_rois(2), size=size)


@pytest.mark.parametrize("shapes", [[(9, 11)], [*REAL_LEVELS[2:], (7, 10), (4, 5), (1, 1)]], ids=["one", "six"])
def test_one_level_and_six(shapes):
    rois = small_rois()
    rois[3:, 1:] *= 10
    assert_equals_reference(make_pyramid(levels=shapes), rois, args=form([4.0 * 2**i for i in range(len(shapes))]))


@pytest.mark.parametrize(("shape", "scale"), [((13, 19), 1 / 16), ((1, 9), 0.25), ((1, 1), 1 / 32)], ids=str)
def test_equals_torchvision(shape, scale):
    (features,) = make_pyramid(levels=[shape])
    rois = make_rois(4, size=(shape[0] / scale, shape[1] / scale), largest=2 * max(shape) / scale)
    expected = torchvision.ops.roi_pool(features, rois, 3, scale)
    assert torch.equal(launch([features], rois, None, 3, form([1 / scale])), expected)


def test_every_size_of_bin_rounds_as_torchvisions():
    """Sizes in cells over bins are no exact floats: ceil(7 * (size / 7)) is not always size."""
    features = torch.randn(1, 1, 60, 1, generator=seeded())
    sides = torch.arange(-2.0, 60, 9)
    corners = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997])
    sides, corners = torch.cat([sides, corners]), torch.cat([torch.ones_like(sides), corners])
    rois = torch.stack([sides * 0, sides * 0, corners, sides * 0, sides], dim=1)
    assert torch.equal(launch([features], rois, None, 7, form([1])), torchvision.ops.roi_pool(features, rois, 7))


def test_equals_onnx():
    (features,) = make_pyramid(levels=[(13, 19)])
    rois = torch.cat([make_rois(3, size=(208, 304), largest=300), torch.tensor([[1, 40.0, 40, 40, 40]])])
    onnx = run_node("MaxRoiPool", features.numpy(), rois.numpy(), opset=20, pooled_shape=[3, 3], spatial_scale=1 / 16)
    assert torch.equal(launch([features], rois, None, 3, form([16])), torch.from_numpy(onnx[0]))


@settings(deadline=None, max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    corners=st.lists(st.tuples(*[st.integers(-20, 60).map(lambda i: i / 4)] * 4), min_size=1, max_size=3),
    size=st.integers(1, 4),
)
def test_any_map_and_any_box(shape, corners, size):
    features = torch.randn(1, 2, *shape, generator=seeded()).round()  # with ties
    rois = torch.tensor([(0.0, *corner) for corner in corners])
    expected = torchvision.ops.roi_pool(features, rois, size, 0.5)
    assert torch.equal(launch([features], rois, None, size, form([2])), expected)


def test_memory_format_does_not_matter():
    features, rois = make_pyramid(c=6, levels=SHAPES), small_rois(2)
    expected = launch(features, rois)
    channels_last = [level.to(memory_format=torch.channels_last) for level in features]
    sliced = [torch.cat([level] * 2, dim=1)[:, 6:] for level in features]
    for same in (channels_last, sliced):
        assert torch.equal(launch(same, torch.cat([rois, rois], dim=1)[:, 5:]), expected)
    counts = torch.tensor([[1, 9], [0, 9]])[:, 0]
    assert torch.equal(launch(features, rois, counts), expected * torch.tensor([1, 0])[:, None, None, None])


def test_rois_that_are_not_there_give_zeros():
    features, counts = make_pyramid(levels=SHAPES), torch.tensor([5, 3])
    rois = torch.tensor([[0.0, 4, 8, 30, 20]] * 6 + [[1.0, 9, 3, 70, 50]] * 6)
    expected = launch(features, rois, counts)
    assert expected[5].count_nonzero() + expected[9:].count_nonzero() == 0
    assert all(pooled.count_nonzero() for pooled in [*expected[:5], *expected[6:9]])
    for i, bad in enumerate([math.nan, math.inf, -math.inf, math.nan, math.inf]):
        rois[i, i] = bad
    rois[6, 0], rois[7, 0] = 2, -1
    pooled = launch(features, rois, counts)
    assert pooled[:8].count_nonzero() == 0
    assert torch.equal(pooled[8:], expected[8:])


def test_huge_inverted_and_empty_boxes():
    boxes = [[-3e38, -3e38, 3e38, 3e38], [-1e9, 0, -1e8, 5], [3e38, 3e38, 3.1e38, 3.1e38], [0, 0, 8, 5000]]
    boxes += [[40, 40, 40, 40], [60, 50, 20, 30], [60, 30, 20, 50], [5, 5, 5, 50]]
    rois = torch.tensor([(0.0, *box) for box in boxes])
    assert_equals_reference(make_pyramid(levels=SHAPES[:2]), rois, args=form((4, 8)))


def test_nothing_to_pool():
    features = make_pyramid(levels=SHAPES, dtype=torch.float16)
    assert launch(features, torch.zeros(0, 5)).shape == (0, 4, 2, 2)
    assert launch([level[:0] for level in features], torch.zeros(3, 5)).count_nonzero() == 0


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_equals_the_reference(dtype, ties):
    features, rois, counts = make_pyramid(c=3, levels=SHAPES, dtype=dtype), small_rois(), torch.tensor([3, 2])
    features = [(level.relu() if ties else level).requires_grad_() for level in features]
    gradient = torch.randn(6, 3, 3, 3, generator=seeded()).to(dtype)
    upcast = [level.float() for level in features]
    pooled = multilevel_roi_pool_reference(upcast, rois, counts, 3, *FORM)
    expected = torch.autograd.grad(pooled, upcast, gradient.float())
    given = gradient, [level.detach() for level in features], rois, counts
    on_device = gradient.to(DEVICE), [level.to(DEVICE) for level in given[1]], rois.to(DEVICE), counts.to(DEVICE)
    pulled = launch_multilevel_roi_pool_backward(*on_device, *FORM)
    explicit = multilevel_roi_pool_backward_reference(*given, *FORM)
    for level, other, wanted in zip(pulled, explicit, expected, strict=True):
        for found in (level.cpu(), other):
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.float(), wanted, rtol=STEPS[dtype], atol=8 * STEPS[dtype], check_stride=False
            )


def test_compiles_whole_with_its_gradient():
    features = [level.to(DEVICE).requires_grad_() for level in make_pyramid(levels=SHAPES[:2])]
    rois = small_rois().to(DEVICE)

    def pool(*levels):
        return multilevel_roi_pool(levels, rois, output_size=2, strides=STRIDES[:2], canonical_size=120)

    expected, compiled = pool(*features), torch.compile(pool, fullgraph=True, backend="aot_eager")(*features)
    assert torch.equal(compiled, expected)
    for level in zip(*(torch.autograd.grad(p.square().sum(), features) for p in (compiled, expected)), strict=True):
        torch.testing.assert_close(*level, check_stride=False)


def real_arguments(seed, dtype=torch.float16):
    features = [torch.randn(2, 256, h, w, generator=seeded(seed + h)).to(dtype) for h, w in REAL_LEVELS[:4]]
    rois = make_rois(500)[torch.randperm(1000, generator=seeded(seed))]
    return features, rois, torch.tensor([400, 500 - seed]), 7, *form(canonical_size=224.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_real_pyramid(dtype):
    features, rois, counts, size, *args = real_arguments(1, dtype)
    assert_equals_reference(features, rois, counts, size, args)


@pytest.mark.gpu
def test_capturable():
    assert_capturable(launch_multilevel_roi_pool, real_arguments(1), real_arguments(2))
