"""The windows' kernels against the reference; the product's against the convolution in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_kernels.triton.windows import (
    launch_gather_windows,
    launch_gather_windows_backward,
    launch_window_linear,
)
from fpn_kernels.windows import gather_windows_backward_reference, gather_windows_reference
from tests.kernels.boxes import REAL_LEVELS, make_pyramid, seeded
from tests.kernels.test_windows import SHAPES, make_places
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE
from tests.kernels.triton.test_topdown import FLOATS, STEPS

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NOWHERE = torch.tensor([[-1, 0, 1, 1], [2, 0, 1, 1], [0, -1, 1, 1], [1, 4, 0, 0], [10**12, 0, 1, 1], [0, 0, 10**12, 1]])


def on_device(features):
    return [level.to(DEVICE) for level in features]


def assert_gathers(features, places, kernel):
    windows = launch_gather_windows(on_device(features), places.to(DEVICE), kernel)
    expected = gather_windows_reference(features, places, kernel)
    assert windows.dtype == features[0].dtype
    assert torch.equal(windows.cpu(), expected)


def linear_parts(channels, columns, kernel, dtype):
    depth = kernel**2 * channels
    weight = torch.randn(columns, depth, generator=seeded(depth)) / depth**0.5
    return weight.to(dtype), torch.randn(columns, generator=seeded(columns)).to(dtype)


def assert_multiplies(features, places, weight, bias, kernel, relu):
    given = (None if part is None else part.to(DEVICE) for part in (weight, bias))
    out = launch_window_linear(on_device(features), places.to(DEVICE), *given, kernel, relu).cpu()
    assert out.dtype == features[0].dtype
    windows = gather_windows_reference([level.double() for level in features], places, kernel).flatten(1)
    expected = F.linear(windows, weight.double(), None if bias is None else bias.double())
    # One rounding at the end, and before that as float32 sums do.
    size = windows.abs() @ weight.double().abs().T + 4
    tolerance = 2 * STEPS[out.dtype] * expected.abs() + 2**-24 * weight.shape[1] ** 0.5 * 4 * size
    expected = expected.relu() if relu else expected
    assert ((out.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize(("kernel", "dtype"), [*zip([1, 5, 7], FLOATS, strict=True)], ids=str)
def test_gathers(kernel, dtype):
    assert_gathers(make_pyramid(levels=SHAPES, dtype=dtype), torch.cat([make_places(9), NOWHERE]), kernel)


@pytest.mark.parametrize("channels", [1, 24, 300])
def test_gathers_any_number_of_channels(channels):
    assert_gathers(make_pyramid(c=channels, levels=SHAPES[:2]), make_places(3, levels=SHAPES[:2]), 3)


@settings(deadline=None, max_examples=6)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.sampled_from([1, 3, 5, 9]),
    dtype=st.sampled_from(FLOATS),
    is_last=st.booleans(),
)
def test_gathers_from_any_shape(shape, kernel, dtype, is_last):
    features = make_pyramid(c=3, levels=[shape], dtype=dtype)
    if is_last:
        features = [level.to(memory_format=torch.channels_last) for level in features]
    assert_gathers(features, make_places(4, levels=[shape]), kernel)


def test_strided_features():
    features = [level[:, :, ::2, 1:] for level in make_pyramid(levels=[(8, 7)])]
    places = make_places(5, levels=[(4, 6)])
    assert_gathers(features, places, 3)
    assert_multiplies(features, places, *linear_parts(4, 5, 3, torch.float32), 3, False)


@pytest.mark.parametrize(("kernel", "dtype"), [*zip([3, 1, 5], FLOATS, strict=True)], ids=str)
def test_gradient_equals_the_reference(kernel, dtype):
    places = torch.cat([make_places(9), NOWHERE])
    gradient = torch.randn(len(places), kernel, kernel, 5, generator=seeded()).to(dtype)
    sizes = [2, *(side for shape in SHAPES for side in shape)]
    found = launch_gather_windows_backward(gradient.to(DEVICE), sizes, places.to(DEVICE))
    for level, expected in zip(found, gather_windows_backward_reference(gradient, sizes, places), strict=True):
        assert level.dtype == dtype
        torch.testing.assert_close(level.cpu(), expected, rtol=2 * STEPS[dtype], atol=1e-5, check_stride=False)


@pytest.mark.parametrize(("kernel", "dtype"), [*zip([5, 3, 1], FLOATS, strict=True)], ids=str)
def test_multiplies(kernel, dtype):
    features = make_pyramid(c=24, levels=SHAPES, dtype=dtype)
    assert_multiplies(
        features, torch.cat([make_places(9), NOWHERE]), *linear_parts(24, 40, kernel, dtype), kernel, True
    )


@pytest.mark.parametrize("channels", [1, 64, 100])
@pytest.mark.parametrize("columns", [1, 70])
def test_multiplies_ragged_tiles(channels, columns):
    features = make_pyramid(c=channels, levels=SHAPES[1:3])
    weight, bias = linear_parts(channels, columns, 3, torch.float32)
    assert_multiplies(features, make_places(60, levels=SHAPES[1:3]), weight, bias, 3, False)
    assert_multiplies(features, make_places(1, levels=SHAPES[1:3]), weight, None, 3, False)


def test_nan_goes_through_the_activation():
    features = [torch.full((1, 16, 2, 2), torch.nan)]
    places = torch.tensor([[0, 0, 0, 0], [0, -1, 0, 0]])
    out = launch_window_linear(on_device(features), places.to(DEVICE), torch.ones(3, 16, device=DEVICE), None, 1, True)
    assert out.isnan().tolist() == [[True] * 3, [False] * 3]


def test_nothing_to_do():
    features, none = on_device(make_pyramid(levels=SHAPES)), torch.empty(0, 4, dtype=torch.int64, device=DEVICE)
    assert launch_gather_windows(features, none, 5).shape == (0, 5, 5, 4)
    assert launch_window_linear(features, none, torch.zeros(6, 100, device=DEVICE), None, 5, False).shape == (0, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kernel", [5, 7])
def test_real_levels(kernel, dtype):
    features = make_pyramid(n=1, c=128, levels=REAL_LEVELS, dtype=dtype)
    places = make_places(1000, n=1, levels=REAL_LEVELS)
    assert_gathers(features, places, kernel)
    assert_multiplies(features, places, *linear_parts(128, 512, kernel, dtype), kernel, True)


@pytest.mark.gpu
def test_capturable():
    features = [make_pyramid(c=128, levels=REAL_LEVELS, dtype=torch.float16) for _ in range(2)]
    places = [make_places(500, levels=REAL_LEVELS, seed=seed) for seed in (1, 2)]
    assert_capturable(launch_gather_windows, (features[0], places[0], 5), (features[1], places[1], 5))
    weight, bias = linear_parts(128, 512, 5, torch.float16)
    assert_capturable(
        launch_window_linear,
        (features[0], places[0], weight, bias, 5, True),
        (features[1], places[1], weight, bias, 5, True),
    )
