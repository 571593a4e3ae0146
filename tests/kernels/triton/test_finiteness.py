"""The look for NaN and infinity on the device: every layout, number type and place."""

import math
from importlib import import_module
from unittest import mock

import pytest
import torch

from fpn_kernels.finiteness import find_nonfinite_reference
from fpn_kernels.triton.finiteness import launch_find_nonfinite
from tests.kernels.boxes import REAL_LEVELS, make_pyramid, seeded
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MODULE = import_module("fpn_kernels.triton.finiteness")
BAD = [math.nan, math.inf, -math.inf]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SMALL = {"BLOCK": 16, "FEW": 8}  # so that few numbers are many blocks


def launch(tensors, known=None):
    return launch_find_nonfinite([tensor.to(DEVICE) for tensor in tensors], known)


def count_launches(tensors):
    """Of whole words and of single numbers, and what is found."""
    launchers = {name: mock.Mock(wraps=getattr(MODULE, name)) for name in ("_check_words", "_check_numbers")}
    with mock.patch.multiple(MODULE, **launchers):
        found = launch_find_nonfinite(tensors, None)
    return *(launcher.call_count for launcher in launchers.values()), found.tolist()


def make_layouts(dtype):
    """(3, C, H, W) tensors of one number type as they may come, none of which overlap."""
    merged = torch.randn(3, 5, 4, 15, generator=seeded()).to(DEVICE, dtype).permute(0, 3, 1, 2)
    wide = torch.randn(3, 8, 4, 6, generator=seeded()).to(DEVICE, dtype)
    long = torch.randn(4, 3, 3, 2, 7, generator=seeded()).to(DEVICE, dtype)
    return {
        "contiguous": wide.clone(),
        "channels_last": wide.contiguous(memory_format=torch.channels_last),
        "odd": torch.randn(3, 3, 5, 7, generator=seeded()).to(DEVICE, dtype),
        "one": torch.randn(3, 1, 1, 1, generator=seeded()).to(DEVICE, dtype),
        "slice of a merged map": merged[:, 3:13],
        "crop": wide.clone()[:, :, 1:3, 2:5],
        "every other image": long[:, 0, :, :, :][:3],
        "beyond a boundary": torch.randn(3 * 48 + 1).to(DEVICE, dtype)[1:].view(3, 4, 4, 3),
        "images first to last": wide.clone().flip(0).transpose(2, 3),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", make_layouts(torch.float32))
def test_a_number_anywhere(layout, dtype):
    tensor = make_layouts(dtype)[layout]
    other = torch.zeros(3, 2, 3, device=DEVICE)
    with mock.patch.multiple(MODULE, **SMALL):
        assert launch_find_nonfinite([other, tensor], None).tolist() == [0, 0, 0]
        for image in range(3):
            for number, at in enumerate((0, tensor[0].numel() // 2, tensor[0].numel() - 1)):
                place = (image, *(int(i) for i in torch.unravel_index(torch.tensor(at), tensor.shape[1:])))
                before = tensor[place].clone()
                tensor[place] = BAD[number]
                expected = [int(i == image) for i in range(3)]
                assert launch_find_nonfinite([tensor, other], None).tolist() == expected
                assert find_nonfinite_reference([tensor], None).tolist() == expected
                tensor[place] = before


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_around_a_slice_is_not_its_own(dtype):
    merged = torch.full((2, 6, 5, 16), math.nan, dtype=dtype, device=DEVICE)
    merged[:, 1:4, :, 2:9] = 1.0
    assert launch_find_nonfinite([merged[:, 1:4, :, 2:9].permute(0, 3, 1, 2)], None).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_and_smallest_numbers_are_finite(dtype):
    kinds = torch.finfo(dtype)
    row = torch.tensor([kinds.max, kinds.min, kinds.tiny, -kinds.tiny, kinds.smallest_normal / 2, 0.0, -0.0, 1.0])
    assert launch([row.to(dtype).repeat(2, 9)]).tolist() == [0, 0]


@pytest.mark.parametrize("value", BAD)
def test_either_half_of_a_word(value):
    for dtype in FLOATS:
        for at in range(8):
            row = torch.full((1, 8), -1.5, dtype=dtype)
            row[0, at] = value
            assert launch([row]).tolist() == [1]


def test_every_pattern_of_16_bits():
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = patterns.view(dtype)
        rows = torch.ones(len(numbers) // 64, 64, 8, dtype=dtype)  # each beside ones
        rows[:, :, 3] = numbers.view(-1, 64)
        expected = (~numbers.isfinite()).view(-1, 64).any(dim=1).to(torch.int64)
        assert torch.equal(launch([rows]).cpu(), expected)


def test_dense_tensors_take_one_launch_whatever_their_types():
    features = make_pyramid(n=2, c=8, levels=[(8, 6), (4, 3)], dtype=torch.float16)
    features = [level.contiguous(memory_format=torch.channels_last).to(DEVICE) for level in features]
    more = [torch.zeros(2, 4, 4, device=DEVICE), torch.zeros(2, 8, 4, dtype=torch.bfloat16, device=DEVICE)]
    assert count_launches([*features, *more]) == (1, 0, [0, 0])


@pytest.mark.parametrize("backwards", [False, True])
def test_slices_of_a_merged_head_are_one_tensor(backwards):
    maps = [torch.randn(2, h, w, 15, generator=seeded()).to(DEVICE) for h, w in ((8, 6), (4, 4))]
    slices = [level.permute(0, 3, 1, 2)[:, part] for level in maps for part in (slice(3), slice(3, None))]
    rows = torch.randn(2, 8, 10, generator=seeded()).to(DEVICE)
    tensors = [*slices, rows[..., :2], rows[..., 2:]][:: -1 if backwards else 1]
    assert count_launches(tensors) == (1, 0, [0, 0])
    maps[1][1, 3, 3, 14] = math.nan
    assert count_launches(tensors) == (1, 0, [0, 1])


def test_alike_tensors_that_are_not_neighbours_stay_apart():
    base = torch.ones(2, 4, 4, 16, device=DEVICE)
    base[..., 4:8] = math.nan
    assert launch_find_nonfinite([base[..., :4], base[..., 8:12]], None).tolist() == [0, 0]
    assert launch_find_nonfinite([base[..., :8]], None).tolist() == [1, 1]


@pytest.mark.parametrize("processors", [1, 7])
def test_any_number_of_programs(processors):
    tensor = torch.zeros(2, 301, 4)
    tensor[1, 300, 3] = math.inf
    with mock.patch.multiple(MODULE, _count_processors=lambda device: processors, **SMALL):
        assert launch([tensor, torch.zeros(2, 3)]).tolist() == [0, 1]


def test_nothing_to_look_at():
    assert launch([torch.zeros(2, 0), torch.zeros(2, 3, 0, 4)]).tolist() == [0, 0]
    assert launch([torch.zeros(0, 3, 4, 4)]).shape == (0,)
    assert launch([torch.zeros(2, 0), torch.full((2, 1), math.nan)]).tolist() == [1, 1]


def test_what_is_known_is_kept():
    known = torch.tensor([0, 1, 0], device=DEVICE)
    tensor = torch.zeros(3, 4)
    tensor[2, 0] = math.nan
    assert launch([tensor], known).tolist() == [0, 1, 1]
    assert known.tolist() == [0, 1, 0]


def make_real(n=2, bad=None):
    """R50-FPN's at 800 x 1216: half-precision features, a merged head in float32."""
    features = [
        level.contiguous(memory_format=torch.channels_last) for level in make_pyramid(n=n, c=256, dtype=torch.float16)
    ]
    maps = [torch.zeros(n, h, w, 15) for h, w in REAL_LEVELS]
    if bad is not None:
        maps[-1][bad, -1, -1, -1] = math.inf
    heads = [level.to(DEVICE).permute(0, 3, 1, 2) for level in maps]
    return [level.to(DEVICE) for level in features] + [
        level[:, part] for part in (slice(3), slice(3, None)) for level in heads
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 4])
def test_real_pyramid(n):
    assert launch_find_nonfinite(make_real(n), None).tolist() == [0] * n
    for place in range(4):
        tensors = make_real(n)
        tensors[place][n - 1, -1, -1, -1] = math.nan
        assert launch_find_nonfinite(tensors, None).tolist() == [0] * (n - 1) + [1]
    assert launch_find_nonfinite(make_real(n, bad=0), None).tolist() == [1] + [0] * (n - 1)


@pytest.mark.gpu
def test_capturable():
    known = torch.tensor([0, 1])
    tensors = [torch.randn(2, 8, 16, 4).half(), torch.randn(2, 5, 7)]
    others = [tensor.clone() for tensor in tensors]
    others[1][0, 4, 6] = math.nan
    assert_capturable(launch_find_nonfinite, (tensors, known), (others, known))
