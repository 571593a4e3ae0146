"""RoIAlign's kernel against the reference, torchvision and ONNX RoiAlign; its gradient; levels without a logarithm."""

import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_kernels import assign_levels, multilevel_roi_align
from fpn_kernels.roi_align import multilevel_roi_align_backward_reference, multilevel_roi_align_reference
from fpn_kernels.triton.roi_align import launch_multilevel_roi_align, launch_multilevel_roi_align_backward
from fpn_kernels.triton.rois import smallest_sizes, to_nhwc
from tests.kernels.boxes import REAL_LEVELS, make_pyramid, make_rois, random_boxes, seeded
from tests.kernels.onnx_node import run_node
from tests.kernels.test_roi_align import assert_close
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(13, 19), (7, 10), (4, 5), (1, 3)]
STRIDES = (4.0, 8.0, 16.0, 32.0)
# Of a result of the low types against float32: their rounding, or the truncation of the interpreter's bfloat16 stores.
STEPS = {torch.float32: 8 * 2**-24, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FLOATS = tuple(STEPS)


def form(strides=STRIDES, sampling_ratio=2, aligned=False, *, canonical_size=60.0):
    """The arguments that follow the tensors; RoIs of the tests' small maps are spread over all levels."""
    return list(strides), sampling_ratio, aligned, 2, 4, canonical_size


FORM = form()


def small_rois(count=6):
    """RoIs of all four levels, half of them in either image of 52 x 76 pixels; some reach over the border."""
    sides = torch.tensor([12.0, 150, 30, 90, 50, 260])[:count, None] * torch.tensor([1.25, 0.8])
    centres = torch.rand(count, 2, generator=seeded()) * torch.tensor([76, 52])
    images = torch.arange(2).repeat_interleave(count // 2)[:, None]
    return torch.cat([images, centres - sides / 2, centres + sides / 2], dim=1)


def launch(features, rois, counts=None, size=2, args=FORM):
    on_device = [level.to(DEVICE) for level in features]
    counts = None if counts is None else counts.to(DEVICE)
    pooled = launch_multilevel_roi_align(on_device, rois.to(DEVICE), counts, size, *args)
    assert pooled.dtype == features[0].dtype
    assert pooled.shape == (len(rois), features[0].shape[1], size, size)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    return pooled.cpu()


def assert_equals_reference(features, rois, counts=None, size=2, args=FORM):
    pooled = launch(features, rois, counts, size, args)
    upcast = [level.float() for level in features]
    expected = multilevel_roi_align_reference(upcast, rois, counts, size, *args)
    largest = max(level.abs().max().item() for level in upcast)
    torch.testing.assert_close(pooled.float(), expected, rtol=0, atol=largest * STEPS[features[0].dtype])
    return pooled


@pytest.mark.parametrize(
    ("sampling_ratio", "aligned"), [(0, False), (1, False), (2, False), (3, False), (4, False), (0, True), (2, True)]
)
def test_equals_the_reference(sampling_ratio, aligned):
    features, rois = make_pyramid(c=5, levels=SHAPES), small_rois()
    assert assign_levels(rois[:, 1:], 2, 5, 4, 60).tolist() == [2, 5, 3, 4, 3, 5]
    assert_equals_reference(features, rois, args=form(STRIDES, sampling_ratio, aligned))


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_low_precision_only_rounds_the_result(dtype, sampling_ratio):
    features = make_pyramid(c=8, levels=SHAPES, dtype=dtype)
    assert_equals_reference(features, small_rois(), args=form(STRIDES, sampling_ratio))


@pytest.mark.parametrize("channels", [1, 24, 100, 256, 300])
def test_any_number_of_channels(channels):
    assert_equals_reference(make_pyramid(c=channels, levels=SHAPES), small_rois(2), args=form(STRIDES, 1))


@pytest.mark.parametrize("size", [1, 5, 7, 14, 17])
def test_any_number_of_bins(size):
    assert_equals_reference(make_pyramid(levels=SHAPES), small_rois(2), size=size, args=form(STRIDES, 1))


@pytest.mark.parametrize("shapes", [[(9, 11)], [*REAL_LEVELS[2:], (7, 10), (4, 5), (1, 1)]], ids=["one", "six"])
def test_one_level_and_six(shapes):
    strides = [4.0 * 2**i for i in range(len(shapes))]
    rois = small_rois()
    rois[3:, 1:] *= 10
    assert_equals_reference(make_pyramid(levels=shapes), rois, args=form(strides))


@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(0, False), (2, False), (0, True), (2, True)])
@pytest.mark.parametrize(("shape", "scale"), [((13, 19), 1 / 16), ((1, 9), 0.25)], ids=str)
def test_equals_torchvision(shape, scale, sampling_ratio, aligned):
    (features,) = make_pyramid(levels=[shape])
    rois = make_rois(2, size=(shape[0] / scale, shape[1] / scale), largest=2 * max(shape) / scale)
    pooled = launch([features], rois, None, 2, form([1 / scale], sampling_ratio, aligned))
    expected = torchvision.ops.roi_align(features.double(), rois.double(), 2, scale, sampling_ratio, aligned)
    assert_close(pooled, [features], expected)


@pytest.mark.parametrize(("mode", "sampling_ratio"), [("output_half_pixel", 2), ("half_pixel", 0)])
def test_equals_onnx(mode, sampling_ratio):
    (features,) = make_pyramid(levels=[(13, 19)])
    rois = make_rois(2, size=(208, 304))
    onnx = run_node(
        "RoiAlign",
        *(features.numpy(), rois[:, 1:].numpy(), rois[:, 0].long().numpy()),
        opset=20,
        coordinate_transformation_mode=mode,
        **{"output_height": 2, "output_width": 2, "sampling_ratio": sampling_ratio, "spatial_scale": 1 / 16},
    )
    pooled = launch([features], rois, None, 2, form([16], sampling_ratio, mode == "half_pixel"))
    assert_close(pooled, [features], torch.from_numpy(onnx[0]).double())


@settings(deadline=None, max_examples=8)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    corners=st.lists(st.tuples(*[st.floats(-40, 80, width=32)] * 4), min_size=1, max_size=3),
    sampling_ratio=st.integers(0, 3),
    aligned=st.booleans(),
    size=st.integers(1, 3),
)
def test_any_map_and_any_box(shapes, corners, sampling_ratio, aligned, size):
    features = [torch.randn(1, 2, *shape, generator=seeded()) for shape in shapes]
    rois = torch.tensor([(0.0, *corner) for corner in corners])
    args = form(STRIDES[: len(shapes)], sampling_ratio, aligned, canonical_size=100.0)
    assert_equals_reference(features, rois, size=size, args=args)


def test_memory_format_does_not_matter():
    features, rois, args = make_pyramid(c=6, levels=SHAPES), small_rois(2), form(STRIDES, 1)
    expected = launch(features, rois, args=args)
    channels_last = [level.to(memory_format=torch.channels_last) for level in features]
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(to_nhwc(channels_last), channels_last, strict=True))
    sliced = [torch.cat([level] * 2, dim=1)[:, 6:] for level in features]
    transposed = [level.transpose(2, 3).contiguous().transpose(2, 3) for level in features]
    for same in (channels_last, sliced, transposed):
        assert torch.equal(launch(same, torch.cat([rois, rois], dim=1)[:, 5:], args=args), expected)
    counts = torch.tensor([[1, 9], [0, 9]])[:, 0]
    assert torch.equal(launch(features, rois, counts, args=args), expected * torch.tensor([1, 0])[:, None, None, None])


@pytest.mark.parametrize("sampling_ratio", [0, 1])
def test_rois_that_are_not_there_give_zeros(sampling_ratio):
    features, counts, args = make_pyramid(levels=SHAPES), torch.tensor([5, 3]), form(STRIDES, sampling_ratio)
    rois = torch.tensor([[0.0, 4, 8, 30, 20]] * 6 + [[1.0, 9, 3, 70, 50]] * 6)
    expected = launch(features, rois, counts, args=args)
    assert expected[5].count_nonzero() + expected[9:].count_nonzero() == 0
    assert all(pooled.count_nonzero() for pooled in [*expected[:5], *expected[6:9]])
    for i, bad in enumerate([math.nan, math.inf, -math.inf, math.nan, math.inf]):
        rois[i, i] = bad
    rois[6, 0], rois[7, 0] = 2, -1
    pooled = launch(features, rois, counts, args=args)
    assert pooled[:8].count_nonzero() == 0
    assert torch.equal(pooled[8:], expected[8:])


@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(0, False), (2, False), (0, True)])
def test_huge_inverted_and_empty_boxes(sampling_ratio, aligned):
    boxes = [[-3e38, -3e38, 3e38, 3e38], [-1e9, 0, -1e8, 5], [3e38, 3e38, 3.1e38, 3.1e38], [0, 0, 8, 5000]]
    boxes += [[40, 40, 40, 40], [60, 50, 20, 30], [60, 30, 20, 50], [5, 5, 5, 50]]
    rois = torch.tensor([(0.0, *box) for box in boxes])
    assert_equals_reference(make_pyramid(levels=SHAPES[:2]), rois, size=1, args=form((4, 8), sampling_ratio, aligned))


@pytest.mark.parametrize("n", [0, 2])
def test_nothing_to_pool(n):
    features = make_pyramid(n=n, levels=SHAPES, dtype=torch.float16)
    assert launch(features, torch.zeros(0, 5)).shape == (0, 4, 2, 2)
    if n == 0:
        assert launch(features, torch.zeros(3, 5)).count_nonzero() == 0


@pytest.mark.parametrize(("levels", "min_level", "k0", "size"), [(4, 2, 4, 224), (6, 2, 4, 224), (2, 3, 3, 100.0)])
def test_levels_equal_those_of_eq_1(levels, min_level, k0, size):
    boxes = random_boxes(50_000, largest=3000)
    boundaries = torch.tensor([size * 2.0 ** (level - k0) for level in range(min_level, min_level + levels)])
    sides = boundaries.repeat_interleave(1000) * (1 + 1e-7 * torch.arange(-500, 500)).repeat(levels)
    boxes = torch.cat([boxes, torch.stack([sides * 0, sides * 0, sides, sides], dim=1)])
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
    smallest = torch.tensor(smallest_sizes(levels, min_level, k0, size))
    found = min_level + (sizes[:, None] >= smallest[1:]).sum(dim=1)
    assert torch.equal(found, assign_levels(boxes, min_level, min_level + levels - 1, k0, size))


class Pool(torch.autograd.Function):
    """The kernel and its gradient, which on the CPU are not what the operator dispatches to."""

    @staticmethod
    def forward(ctx, rois, args, *features):
        ctx.given = [2, *(side for level in features for side in level.shape[2:])], rois, args
        return launch_multilevel_roi_align(features, rois, None, 2, *args)

    @staticmethod
    def backward(ctx, gradient):
        sizes, rois, args = ctx.given
        return None, None, *launch_multilevel_roi_align_backward(gradient, sizes, rois, None, *args)


ROIS = torch.tensor([[0.0, 1, 2, 15, 19], [1, -3, 0, 90, 70], [1, 0, 0, 60, 50]])


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # not in float64: linear, so that large steps are exact
@pytest.mark.parametrize(("sampling_ratio", "aligned"), [(0, True), (2, False)])
def test_gradcheck(sampling_ratio, aligned):
    features = [level.to(DEVICE).requires_grad_() for level in make_pyramid(c=2, levels=[(6, 5), (3, 3), (1, 1)])]
    args = form(STRIDES[:3], sampling_ratio, aligned)
    check = {"eps": 1.0, "atol": 1e-4, "nondet_tol": 1e-5, "fast_mode": True, "check_undefined_grad": False}
    assert torch.autograd.gradcheck(Pool.apply, (ROIS.to(DEVICE), args, *features), **check)


@pytest.mark.parametrize(
    ("sampling_ratio", "dtype"),
    [(0, torch.float32), (2, torch.float32), (1, torch.float16), (1, torch.bfloat16)],
    ids=str,
)
def test_gradient_equals_the_reference(sampling_ratio, dtype):
    features, rois, counts = make_pyramid(c=3, levels=SHAPES), small_rois(), torch.tensor([3, 2])
    features = [level.requires_grad_() for level in features]
    args = form(STRIDES, sampling_ratio)
    gradient = torch.randn(6, 3, 2, 2, generator=seeded()).to(dtype)
    pooled = multilevel_roi_align_reference(features, rois, counts, 2, *args)
    expected = torch.autograd.grad(pooled, features, gradient.float(), allow_unused=True)
    sizes = [2, *(side for shape in SHAPES for side in shape)]
    on_device = [part.to(DEVICE) for part in (gradient, rois, counts)]
    pulled = launch_multilevel_roi_align_backward(on_device[0], sizes, *on_device[1:], *args)
    explicit = multilevel_roi_align_backward_reference(gradient, sizes, rois, counts, *args)
    for level, other, wanted in zip(pulled, explicit, expected, strict=True):
        wanted = torch.zeros_like(level, dtype=torch.float32).cpu() if wanted is None else wanted
        for found in (level.cpu(), other):
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.float(), wanted, rtol=STEPS[dtype], atol=8 * STEPS[dtype], check_stride=False
            )


def test_compiles_whole_with_its_gradient():
    features = [level.to(DEVICE).requires_grad_() for level in make_pyramid(levels=SHAPES[:2])]
    rois = small_rois().to(DEVICE)

    def pool(*levels):
        return multilevel_roi_align(levels, rois, output_size=2, strides=STRIDES[:2], canonical_size=120)

    expected, compiled = pool(*features), torch.compile(pool, fullgraph=True, backend="aot_eager")(*features)
    torch.testing.assert_close(compiled, expected)
    for level in zip(*(torch.autograd.grad(p.square().sum(), features) for p in (compiled, expected)), strict=True):
        torch.testing.assert_close(*level, check_stride=False)


def real_arguments(seed, *, dtype=torch.float16, sampling_ratio=2):
    features = [torch.randn(2, 256, h, w, generator=seeded(seed + h)).to(dtype) for h, w in REAL_LEVELS[:4]]
    features = [level.to(memory_format=torch.channels_last) for level in features]
    rois = make_rois(500)[torch.randperm(1000, generator=seeded(seed))]
    return (
        features,
        rois,
        torch.tensor([400, 500 - seed]),
        7,
        *form(sampling_ratio=sampling_ratio, canonical_size=224.0),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_real_pyramid(dtype, sampling_ratio):
    features, rois, counts, size, *args = real_arguments(1, dtype=dtype, sampling_ratio=sampling_ratio)
    assert_equals_reference(features, rois, counts, size, args)


@pytest.mark.gpu
def test_capturable():
    assert_capturable(launch_multilevel_roi_align, real_arguments(1), real_arguments(2))
