"""Top-down merge against interpolate-and-add, with its gradients."""

import pytest
import torch
import torch.nn.functional as F

from fpn_kernels import lateral_merge, topdown_merge
from fpn_kernels.topdown import topdown_merge_reference
from tests.kernels.boxes import REAL_LEVELS, seeded

SHAPES = [(1, 1, 1, 1), (2, 3, 25, 38), (1, 2, 7, 1), (1, 2, 1, 6), (0, 4, 4, 4), (2, 0, 3, 3)]
SHAPES += [(1, 8, *level) for level in REAL_LEVELS[:4]]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    n, c, h, w = shape
    lateral = torch.randn(shape, generator=seeded(1)).to(dtype)
    return lateral, torch.randn(n, c, (h + 1) // 2, (w + 1) // 2, generator=seeded(2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_interpolate_and_add(shape, dtype):
    lateral, coarse = make(shape, dtype)
    merged = topdown_merge(lateral, coarse)
    expected = lateral
    if lateral.numel():
        expected = lateral + F.interpolate(coarse, size=shape[2:], mode="nearest")
    assert merged.dtype == dtype
    assert torch.equal(merged, expected)


def test_each_cell_takes_its_parent():
    lateral = torch.zeros(1, 1, 3, 5)
    coarse = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[None, None]
    rows = [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert topdown_merge(lateral, coarse)[0, 0].tolist() == rows


@pytest.mark.parametrize("lateral_last", [False, True])
@pytest.mark.parametrize("coarse_last", [False, True])
def test_memory_format_does_not_matter(lateral_last, coarse_last):
    lateral, coarse = make((2, 3, 25, 38))
    expected = topdown_merge(lateral, coarse)
    formats = {False: torch.contiguous_format, True: torch.channels_last}
    merged = topdown_merge(
        lateral.to(memory_format=formats[lateral_last]), coarse.to(memory_format=formats[coarse_last])
    )
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("shape", [(1, 2, 4, 6), (2, 1, 5, 3), (1, 1, 1, 1)], ids=str)
def test_gradient(shape):
    lateral, coarse = (tensor.double().requires_grad_() for tensor in make(shape))
    assert torch.autograd.gradcheck(topdown_merge_reference, (lateral, coarse))


def test_gradient_of_the_coarse_level_is_the_sum_of_its_children():
    lateral, coarse = (tensor.requires_grad_() for tensor in make((1, 1, 3, 3)))
    topdown_merge(lateral, coarse).sum().backward()
    assert coarse.grad[0, 0].tolist() == [[4, 2], [2, 1]]
    assert lateral.grad.unique().tolist() == [1]


def test_batch_equals_alone():
    lateral, coarse = make((3, 4, 13, 19))
    together = topdown_merge(lateral, coarse)
    for i in range(3):
        assert torch.equal(together[i], topdown_merge(lateral[i : i + 1], coarse[i : i + 1])[0])


def test_inputs_are_left_alone():
    lateral, coarse = make((1, 2, 5, 5))
    before = lateral.clone(), coarse.clone()
    topdown_merge(lateral, coarse)
    assert torch.equal(lateral, before[0])
    assert torch.equal(coarse, before[1])


@pytest.mark.parametrize(
    ("lateral", "coarse", "message"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(3, 2, 2), "lateral must have shape"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(3, 2, 2), "coarse must have shape"),
        (torch.zeros(1, 3, 5, 4), torch.zeros(1, 3, 2, 2), r"coarse must have shape \(1, 3, 3, 2\)"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), "coarse must have shape"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 2, 2), "coarse must have shape"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 2, 2), "coarse must have shape"),
        (torch.zeros(1, 3, 4, 4).double(), torch.zeros(1, 3, 2, 2).double(), "lateral must be float32"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2).half(), "coarse must be float32, not float16"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2, device="meta"), "must lie on one device"),
    ],
)
def test_rejects(lateral, coarse, message):
    with pytest.raises(ValueError, match=message):
        topdown_merge(lateral, coarse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": torch.zeros(3, 4, 4)}, "c must have shape"),
        ({"c": torch.zeros(2, 3, 4, 4).double()}, "c must be float32"),
        ({"weight": torch.zeros(5, 4)}, r"weight must have shape \(any, 3\)"),
        ({"weight": torch.zeros(5, 3, 3, 3)}, "weight must have shape"),
        ({"weight": torch.zeros(5, 3).half()}, "weight must be float32, not float16"),
        ({"bias": torch.zeros(4)}, "bias must have shape"),
        ({"coarser": torch.zeros(2, 4, 2, 2)}, "coarser must have shape"),
        ({"coarser": torch.zeros(1, 5, 2, 2)}, "coarser must have shape"),
        ({"coarser": torch.zeros(2, 5, 0, 2)}, "coarser must have cells"),
        ({"bias": torch.zeros(5, device="meta")}, "must lie on one device"),
    ],
    ids=str,
)
def test_lateral_rejects(change, message):
    valid = {"c": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(5, 3), "coarser": torch.zeros(2, 5, 2, 2)}
    with pytest.raises(ValueError, match=message):
        lateral_merge(**valid | {"bias": torch.zeros(5)} | change)
