"""Windows of chosen places against unfold and the convolution itself, with their gradients."""

import pytest
import torch
import torch.nn.functional as F

from fpn_kernels import gather_windows, window_linear
from tests.kernels.boxes import make_pyramid, seeded

SHAPES = ((13, 19), (7, 10), (4, 5), (1, 1))


def make_places(count: int, n: int = 2, levels=SHAPES, seed: int = 0) -> torch.Tensor:
    """Places anywhere on all levels, the four corners of each level of each image among them."""
    corners = [
        [i, number, y, x]
        for i in range(n)
        for number, (h, w) in enumerate(levels)
        for y in (0, h - 1)
        for x in (0, w - 1)
    ]
    level = torch.randint(len(levels), (count,), generator=seeded(seed))
    sizes = torch.tensor(levels)[level]
    cells = (torch.rand(count, 2, generator=seeded(seed + 1)) * sizes).long()
    image = torch.randint(n, (count,), generator=seeded(seed + 2))
    return torch.cat([torch.tensor(corners), torch.cat([image[:, None], level[:, None], cells], dim=1)])


def unfold(features, places, kernel):
    windows = []
    for image, level, y, x in places.tolist():
        columns = F.unfold(features[level][image : image + 1], kernel, padding=kernel // 2)
        column = columns[0, :, y * features[level].shape[3] + x]
        windows.append(column.view(-1, kernel, kernel).permute(1, 2, 0))
    return torch.stack(windows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_equals_unfold(kernel, dtype):
    features, places = make_pyramid(levels=SHAPES, dtype=dtype), make_places(20)
    windows = gather_windows(features, places, kernel)
    assert windows.dtype == dtype
    assert torch.equal(windows, unfold([level.float() for level in features], places, kernel).to(dtype))


def test_a_window_beyond_the_border_is_padded_with_zeros():
    features = torch.arange(1.0, 7).view(1, 1, 2, 3)
    window = gather_windows([features], torch.tensor([[0, 0, 1, 2]]), 3)
    assert window[0, :, :, 0].tolist() == [[2, 3, 0], [5, 6, 0], [0, 0, 0]]


@pytest.mark.parametrize("kernel", [5, 7])
def test_a_linear_layer_on_them_is_the_convolution(kernel):
    features, places = make_pyramid(levels=SHAPES), make_places(20)
    weight, bias = torch.randn(6, 4, kernel, kernel, generator=seeded()), torch.randn(6, generator=seeded(1))
    maps = [F.conv2d(level, weight, bias, padding=kernel // 2) for level in features]
    expected = torch.stack([maps[level][image, :, y, x] for image, level, y, x in places.tolist()])
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(window_linear(features, places, rows, bias, kernel=kernel), expected)
    ramped = window_linear(features, places, rows, bias, kernel=kernel, relu=True)
    torch.testing.assert_close(ramped, expected.relu())
    torch.testing.assert_close(window_linear(features, places, rows, kernel=kernel), expected - bias)


def test_places_of_no_image_or_level_are_zeros():
    features = [torch.ones(2, 3, 4, 5), torch.ones(2, 3, 2, 3)]
    nowhere = torch.tensor(
        [[-1, 0, 1, 1], [2, 0, 1, 1], [0, -1, 1, 1], [0, 2, 1, 1], [10**12, 0, 1, 1], [0, 0, 10**12, 1]]
    )
    assert gather_windows(features, nowhere, 3).count_nonzero() == 0
    bias = torch.tensor([-1.0, 2.0])
    rows = window_linear(features, nowhere, torch.ones(2, 27), bias, kernel=3, relu=True)
    assert rows.tolist() == [[0, 2]] * 6


def test_what_is_not_finite_stays_where_it_is():
    features = torch.zeros(1, 1, 4, 4)
    features[0, 0, 0, 0] = torch.nan
    windows = gather_windows([features], torch.tensor([[0, 0, 0, 2], [0, 0, 0, 1], [0, 0, 3, 3]]), 3)
    assert windows.isnan().flatten(1).sum(dim=1).tolist() == [0, 1, 0]


def test_no_places_and_no_cells():
    features = make_pyramid(levels=SHAPES)
    none = torch.empty(0, 4, dtype=torch.int64)
    assert gather_windows(features, none, 5).shape == (0, 5, 5, 4)
    assert window_linear(features, none, torch.zeros(6, 100), kernel=5).shape == (0, 6)
    assert gather_windows([torch.zeros(1, 2, 0, 3)], torch.zeros(1, 4, dtype=torch.int64), 3).count_nonzero() == 0


def test_memory_format_does_not_matter():
    features, places = make_pyramid(levels=SHAPES), make_places(9)
    last = [level.to(memory_format=torch.channels_last) for level in features]
    assert torch.equal(gather_windows(last, places, 5), gather_windows(features, places, 5))


@pytest.mark.parametrize("kernel", [1, 3])
def test_gradients(kernel):
    """The operators' own, in float64 but for the sums over cells, against those of the parts."""
    features = [level.double().requires_grad_() for level in make_pyramid(c=2, levels=((3, 4), (2, 1)))]
    places = torch.cat([make_places(3, levels=((3, 4), (2, 1))), torch.tensor([[0, -1, 0, 0]])])
    weight, bias = (torch.randn(shape, generator=seeded(), dtype=torch.double) for shape in ((3, 2 * kernel**2), (3,)))

    of_op = torch.ops.fpn.gather_windows(features, places, kernel).square().sum()
    of_parts = gather_plainly(features, places, kernel).square().sum()
    for found, wanted in zip(*(torch.autograd.grad(out, features) for out in (of_op, of_parts)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, check_stride=False)

    leaves = [weight.requires_grad_(), bias.requires_grad_(), *features]
    of_op = torch.ops.fpn.window_linear(features, places, weight, bias, kernel, True).square().sum()
    of_parts = F.linear(gather_plainly(features, places, kernel).flatten(1), weight, bias).relu().square().sum()
    for found, wanted in zip(*(torch.autograd.grad(out, leaves) for out in (of_op, of_parts)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, check_stride=False)


def gather_plainly(features, places, kernel):
    """In the plainest form that autograd sees through."""
    padded = [F.pad(level, [kernel // 2] * 4) for level in features]
    c = features[0].shape[1]
    return torch.stack(
        [
            padded[level][image, :, y : y + kernel, x : x + kernel].permute(1, 2, 0)
            if level >= 0
            else features[0].new_zeros(kernel, kernel, c)
            for image, level, y, x in places.tolist()
        ]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "at least one level"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"kernel": -1}, "kernel must be odd"),
        ({"features": [torch.zeros(2, 3, 4)]}, "features must have shape"),
        ({"features": [torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 2, 2)]}, "features must have shape"),
        ({"features": [torch.zeros(2, 3, 4, 4, dtype=torch.double)]}, "features must be float32"),
        (
            {"features": [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2).half()]},
            "features must be float32, not float16",
        ),
        ({"places": torch.zeros(5, 3, dtype=torch.int64)}, "places must have shape"),
        ({"places": torch.zeros(5, 4)}, "places must be int64"),
        ({"places": torch.zeros(5, 4, dtype=torch.int64, device="meta")}, "must lie on one device"),
    ],
    ids=str,
)
def test_rejects(change, message):
    valid = {"features": [torch.zeros(2, 3, 4, 4)], "places": torch.zeros(5, 4, dtype=torch.int64), "kernel": 3}
    with pytest.raises(ValueError, match=message):
        gather_windows(**valid | change)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(6, 26), None, r"weight must have shape \(any, 27\)"),
        (torch.zeros(6, 27).half(), None, "weight must be float32, not float16"),
        (torch.zeros(6, 27), torch.zeros(5), "bias must have shape"),
        (torch.zeros(6, 27), torch.zeros(6).half(), "bias must be float32"),
        (torch.zeros(6, 27, device="meta"), None, "must lie on one device"),
    ],
)
def test_linear_rejects(weight, bias, message):
    with pytest.raises(ValueError, match=message):
        window_linear([torch.zeros(2, 3, 4, 4)], torch.zeros(5, 4, dtype=torch.int64), weight, bias, kernel=3)
