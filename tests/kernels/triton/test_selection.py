"""Selection on the device against the reference, Python's sort and torch.topk."""

import math
from importlib import import_module
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_kernels.selection import select_topk_reference
from fpn_kernels.triton.selection import launch_select_topk
from tests.kernels.boxes import REAL_LEVELS, seeded
from tests.kernels.test_selection import AWKWARD, by_sorting, make_objectness
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MODULE = import_module("fpn_kernels.triton.selection")
# Blocks so small that a few logits cross every boundary that thousands would, and a digit that does not divide 63.
SMALL = {"BLOCK": 32, "BINS": 64, "BIN_BITS": 6, "NARROW_BLOCK": 32, "RANK_ROWS": 8, "RANK_COLUMNS": 16}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def assert_selects(objectness, k):
    """As the reference does, bit for bit but for the sign of a zero."""
    expected = select_topk_reference(objectness, k)
    actual = launch_select_topk([level.to(DEVICE) for level in objectness], k)
    for value, wanted in zip(actual, expected, strict=True):
        assert value.dtype == wanted.dtype
        torch.testing.assert_close(value.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_sorting(dtype):
    objectness = make_objectness(2, [(7, 5), (2, 2)], dtype=dtype)
    objectness[-1][:, :2, 0, 0] = math.nan
    logits, indices, levels = (part.cpu() for part in launch_select_topk([o.to(DEVICE) for o in objectness], 20))
    assert levels.tolist() == [0] * 20 + [1] * 12
    expected = list(by_sorting(objectness, 20))
    for level, slots in enumerate((slice(0, 20), slice(20, 32))):
        for image in range(2):
            best, values = expected[2 * level + image]
            assert indices[image, slots].tolist() == best
            np.testing.assert_array_equal(logits[image, slots].numpy(), np.array(values, dtype=np.float32))


@settings(deadline=None, max_examples=12)
@given(st.lists(st.one_of(AWKWARD, st.floats(width=32)), min_size=40, max_size=40), st.integers(1, 40))
def test_awkward_logits_equal_the_reference(row, k):
    level = torch.tensor(row, dtype=torch.float32).view(1, 2, 4, 5)
    with mock.patch.multiple(MODULE, LISTED=2, **SMALL):
        assert_selects([level], k)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("k", [3, 40])
def test_thousands_of_ties_take_the_lowest_indices(k, memory_format):
    tied = torch.randint(-1, 2, (2, 3, 25, 20), generator=seeded()) / 2
    same = torch.full((2, 3, 9, 7), -3.25)
    levels = [level.contiguous(memory_format=memory_format) for level in (tied, same)]
    with mock.patch.multiple(MODULE, LISTED=8, BLOCK=256, NARROW_BLOCK=128):
        assert_selects(levels, k)


@pytest.mark.parametrize(
    ("k", "better"),
    [
        # The two above the crowd of eight make the list ten long, which is more than is ranked as it is.
        (3, dict.fromkeys(range(20, 28), 1.0) | {50: 5.0, 51: 5.0}),
        # Index 5 lies above the last three bits of 8..15, but within the digit's width of them.
        (2, {5: 1.0} | dict.fromkeys(range(8, 16), 1.0)),
    ],
)
def test_narrowing_counts_what_lies_above(k, better):
    level = torch.full((60,), -1.0)
    level[list(better)] = torch.tensor(list(better.values()))
    with mock.patch.multiple(MODULE, LISTED=2, **SMALL):
        assert_selects([level.view(1, 1, 6, 10)], k)


@pytest.mark.parametrize(("scale", "offset"), [(1e-6, -5.0), (0.01, 0.0), (1.0, -5.0), (1.0, 17.0), (300.0, 0.0)])
def test_any_spread_of_logits(scale, offset):
    """All in one bin, spread over many, or beyond the outermost."""
    level = offset + scale * torch.randn(1, 3, 20, 15, generator=seeded())
    with mock.patch.multiple(MODULE, LISTED=64, BLOCK=512):
        assert_selects([level], 20)
    values = launch_select_topk([level.to(DEVICE)], 20)[0].cpu()
    assert torch.equal(values[0], level.flatten().topk(20).values)


def test_views_are_read_where_they_are():
    """Channels of a merged head, uneven cells, levels of one row, of one column, of different dtypes, of nothing."""
    merged = torch.randn(2, 15, 6, 4, generator=seeded())
    crops = [merged.contiguous(memory_format=torch.channels_last), torch.randn(2, 15, 12, 9)[..., :8]]
    levels = [level[:, 2:5] for level in (merged, *crops)]
    levels += [torch.randn(2, 3, 1, 5).half(), torch.randn(2, 3, 5, 1).bfloat16(), torch.randn(2, 3, 0, 4)]
    levels += [torch.randn(2, 3, 4, 1).contiguous(memory_format=torch.channels_last).transpose(2, 3)]
    assert_selects(levels, 25)


def test_many_anchors_and_one():
    assert_selects([torch.randn(1, 9, 3, 4, generator=seeded()), torch.randn(1, 9, 1, 1)], 30)
    assert_selects([torch.randn(3, 1, 1, 1)], 1)


def test_large_k_is_left_to_sorting():
    with mock.patch.multiple(MODULE, LARGEST_K=4), mock.patch.object(MODULE, "Maps") as maps:
        assert_selects(make_objectness(2, [(4, 4)]), 5)
        maps.assert_not_called()


@pytest.mark.parametrize("shapes", [[(4, 4), (1, 1)], [(0, 4)]], ids=str)
def test_nothing_to_select(shapes):
    assert_selects(make_objectness(0, shapes), 10)
    assert_selects([torch.zeros(2, 3, 0, 4)], 10)


def test_every_launch_gives_the_same():
    objectness = [level.round().to(DEVICE) for level in make_objectness(2, [(20, 15)])]
    first = launch_select_topk(objectness, 50)
    for part, again in zip(first, launch_select_topk(objectness, 50), strict=True):
        assert torch.equal(part, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_real_pyramid(dtype, ties):
    objectness = make_objectness(4, REAL_LEVELS, dtype=dtype)
    assert_selects([(level.round() if ties else 3 * level - 6) for level in objectness], 1000)
    assert_selects([torch.zeros_like(level) for level in objectness[:2]], 2000)


@pytest.mark.gpu
def test_capturable():
    objectness = make_objectness(2, REAL_LEVELS, dtype=torch.float16)
    assert_capturable(launch_select_topk, (objectness, 1000), ([level.round() for level in objectness], 1000))
