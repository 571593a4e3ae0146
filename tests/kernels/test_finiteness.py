"""The reference that looks for NaN and infinity."""

import math

import pytest
import torch

import fpn_kernels
from tests.kernels.boxes import seeded

BAD = [math.nan, math.inf, -math.inf]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", BAD)
def test_the_image_that_has_one(dtype, value):
    tensors = [torch.randn(3, 4, 5, 6, generator=seeded()), torch.randn(3, 7, 2, generator=seeded())]
    tensors = [tensor.to(dtype) for tensor in tensors]
    assert fpn_kernels.find_nonfinite(tensors).tolist() == [0, 0, 0]
    tensors[1][2, 6, 1] = value
    assert fpn_kernels.find_nonfinite(tensors).tolist() == [0, 0, 1]


def test_infinities_that_cancel_are_seen():
    assert fpn_kernels.find_nonfinite([torch.tensor([[math.inf, -math.inf]])]).tolist() == [1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_huge_numbers_are_finite(dtype):
    """Also where their sum is not."""
    assert fpn_kernels.find_nonfinite([torch.full((2, 3, 20), torch.finfo(dtype).max, dtype=dtype)]).tolist() == [0, 0]


def test_what_is_known_is_kept():
    known = torch.tensor([0, 1, 0])
    tensor = torch.zeros(3, 2)
    tensor[2, 0] = math.nan
    assert fpn_kernels.find_nonfinite([tensor], known).tolist() == [0, 1, 1]
    assert known.tolist() == [0, 1, 0]


def test_nothing_to_look_at():
    assert fpn_kernels.find_nonfinite([torch.zeros(2, 0), torch.zeros(2, 3, 0, 4)]).tolist() == [0, 0]
    assert fpn_kernels.find_nonfinite([torch.zeros(0, 3, 4, 4)]).shape == (0,)


@pytest.mark.parametrize(
    ("tensors", "known", "message"),
    [
        ([], None, "at least one tensor"),
        ([torch.zeros(2)], None, "an axis behind"),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], None, r"tensors must have shape \(2, any\)"),
        ([torch.zeros(2, 3, dtype=torch.float64)], None, "tensors must be"),
        ([torch.zeros(2, 3)], torch.zeros(3, dtype=torch.int64), r"known must have shape \(2\)"),
        ([torch.zeros(2, 3)], torch.zeros(2), "known must be int64"),
    ],
)
def test_wrong_arguments(tensors, known, message):
    with pytest.raises(ValueError, match=message):
        fpn_kernels.find_nonfinite(tensors, known)
