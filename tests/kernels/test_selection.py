"""Selection against Python sorting, ONNX TopK and torchvision's RPN."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection.rpn import RegionProposalNetwork

from fpn_kernels import select_topk, stable_topk
from tests.kernels.boxes import REAL_LEVELS, seeded
from tests.kernels.onnx_node import run_node

AWKWARD = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**127, -(2.0**127), math.inf, -math.inf, math.nan]
)


def ranking(row: list[float]) -> list[int]:
    """Best first, NaN behind -inf, ties by lower index: Python's sort is stable, and 0.0 == -0.0."""
    return sorted(range(len(row)), key=lambda i: (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i]))


@given(st.lists(st.one_of(AWKWARD, st.floats(width=32)), max_size=40), st.data())
def test_stable_topk_equals_a_stable_sort(row, data):
    k = data.draw(st.integers(0, len(row)))
    assert stable_topk(torch.tensor([row], dtype=torch.float32), k)[0].tolist() == ranking(row)[:k]


@pytest.mark.parametrize("k", [1, 100, 1000])
def test_stable_topk_of_many_ties_equals_argsort_and_onnx(k):
    scores = torch.randint(-8, 8, (3, 20_000), generator=seeded()) / 4
    best = stable_topk(scores, k)
    assert torch.equal(best, scores.argsort(dim=1, descending=True, stable=True)[:, :k])
    onnx = run_node("TopK", scores.numpy(), np.array([k]), opset=20, outputs=2)[1]
    assert np.array_equal(best.numpy(), onnx)


def test_stable_topk_prefix_does_not_depend_on_k():
    scores = torch.randint(4, (2, 500), generator=seeded()).float()
    longest = stable_topk(scores, 500)
    for k in (0, 1, 17, 499):
        assert torch.equal(stable_topk(scores, k), longest[:, :k])


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_stable_topk_of_nothing(shape):
    best = stable_topk(torch.zeros(shape), 0)
    assert best.shape == (shape[0], 0)
    assert best.dtype == torch.int64


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        (torch.zeros(5), 1, "scores must have shape"),
        (torch.zeros(1, 5).double(), 1, "scores must be float32"),
        (torch.zeros(1, 5).half(), 1, "scores must be float32"),
        (torch.zeros(1, 5), 6, "k must be from 0 to 5"),
        (torch.zeros(1, 5), -1, "k must be from 0 to 5"),
    ],
)
def test_stable_topk_rejects(scores, k, message):
    with pytest.raises(ValueError, match=message):
        stable_topk(scores, k)


def make_objectness(n, shapes, anchors=3, dtype=torch.float32):
    return [torch.randn(n, anchors, *shape, generator=seeded(i)).to(dtype) for i, shape in enumerate(shapes)]


def by_sorting(objectness, k):
    """Every level's anchors in the order (y, x, anchor), ranked by Python."""
    for level in objectness:
        for image in level.float():
            row = [image[a, y, x].item() for y, x, a in np.ndindex(*image.shape[1:], image.shape[0])]
            best = ranking(row)[:k]
            yield best, [row[i] for i in best]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", [[(1, 1)], [(7, 5), (4, 3), (2, 2), (1, 1)], [(1, 9), (5, 1)]], ids=str)
def test_select_topk_equals_sorting(shapes, dtype):
    objectness = make_objectness(2, shapes, dtype=dtype)
    objectness[-1][:, :2, 0, 0] = math.nan
    logits, indices, levels = select_topk(objectness, 20)
    slots = [min(20, 3 * h * w) for h, w in shapes]
    assert levels.tolist() == [level for level, count in enumerate(slots) for _ in range(count)]
    expected = list(by_sorting(objectness, 20))
    for level, (some_logits, some) in enumerate(zip(logits.split(slots, 1), indices.split(slots, 1), strict=True)):
        for image in range(2):
            best, values = expected[2 * level + image]
            assert some[image].tolist() == best
            np.testing.assert_array_equal(some_logits[image].numpy(), np.array(values, dtype=np.float32))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_select_topk_equals_torchvision_on_a_real_pyramid(memory_format):
    shapes = [3 * h * w for h, w in REAL_LEVELS]
    # All different, since torch.topk leaves ties open.
    values = torch.randperm(2 * sum(shapes), generator=seeded()).view(2, -1) / 1000 - 200
    per_level = [v.view(2, h, w, 3) for v, (h, w) in zip(values.split(shapes, 1), REAL_LEVELS, strict=True)]
    objectness = [v.permute(0, 3, 1, 2).contiguous(memory_format=memory_format) for v in per_level]

    rpn = RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, {"testing": 1000}, {"testing": 1000}, 0.7).eval()
    expected = rpn._get_top_n_idx(values, shapes)
    logits, indices, levels = select_topk(objectness, 1000)
    starts = torch.tensor([0, *shapes]).cumsum(0)
    assert torch.equal(indices + starts[levels], expected)
    assert torch.equal(logits, values.gather(1, expected))


def test_batch_equals_alone():
    objectness = [level.round() for level in make_objectness(4, [(20, 30), (10, 15)])]  # rounded: full of ties
    logits, indices, _ = select_topk(objectness, 100)
    for i in range(4):
        alone_logits, alone_indices, _ = select_topk([level[i : i + 1] for level in objectness], 100)
        assert torch.equal(logits[i], alone_logits[0])
        assert torch.equal(indices[i], alone_indices[0])


def test_batch_of_none():
    logits, indices, levels = select_topk(make_objectness(0, [(4, 4), (1, 1)]), 10)
    assert (logits.shape, logits.dtype) == ((0, 13), torch.float32)
    assert (indices.shape, indices.dtype) == ((0, 13), torch.int64)
    assert levels.tolist() == [0] * 10 + [1] * 3


@pytest.mark.parametrize(
    ("objectness", "k", "message"),
    [
        ([], 5, "at least one level"),
        ([torch.zeros(1, 3, 2, 2)], 0, "k must be at least 1"),
        ([torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 1, 1)], 5, "objectness must have shape"),
        ([torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 1, 1)], 5, "objectness must have shape"),
        ([torch.zeros(1, 3, 2)], 5, "objectness must have shape"),
        ([torch.zeros(1, 3, 2, 2).double()], 5, "objectness must be float32"),
    ],
)
def test_select_topk_rejects(objectness, k, message):
    with pytest.raises(ValueError, match=message):
        select_topk(objectness, k)
