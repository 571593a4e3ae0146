"""Decoding of proposals on the device against the reference and torchvision, and its exponential against float64."""

import math
from importlib import import_module
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import clip_boxes_to_image

from fpn_kernels.decode import decode_proposals_reference
from fpn_kernels.selection import select_topk_reference
from fpn_kernels.triton.boxes import exponential
from fpn_kernels.triton.decode import launch_decode_proposals
from tests.kernels.boxes import REAL_LEVELS, REAL_SIZE, seeded
from tests.kernels.test_decode import ALL, BASE_ANCHORS, make_outputs, torchvision_proposals
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MODULE = import_module("fpn_kernels.triton.decode")
SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]  # of (64, 96)
EPS = torch.finfo(torch.float32).eps


def launch(logits, indices, deltas, base_anchors, padded_size, image_sizes, k, min_size=1e-3, score_thresh=0.0):
    arguments = (
        logits.to(DEVICE), indices.to(DEVICE), [level.to(DEVICE) for level in deltas], base_anchors.to(DEVICE),
        padded_size, image_sizes.to(DEVICE), k, min_size, score_thresh,
    )  # fmt: skip
    return tuple(part.cpu() for part in launch_decode_proposals(*arguments))


def assert_close(actual, expected):
    """The same but for the rounding of exp, where a box is kept."""
    assert torch.equal(actual[1].isinf(), expected[1].isinf())
    torch.testing.assert_close(actual[1], expected[1], rtol=3 * EPS, atol=0)
    # A side of up to 1000 pixels times an exp that is 3 eps off, in a corner that rounds once more.
    torch.testing.assert_close(actual[0], expected[0], rtol=2 * EPS, atol=3 * EPS * 1000)


@triton.jit
def _exponential_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, exponential(tl.load(x + i)))


def test_exponential_is_within_one_ulp():
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, -1e-45, 88.72, 88.73, -103.9, -104.1, 1e30]
    x = torch.cat([torch.linspace(-105, 90, 1 << 16), torch.linspace(-5, 5, 1 << 16), torch.tensor(special)])
    x = torch.nn.functional.pad(x, (0, -len(x) % 4096)).to(DEVICE)
    y = torch.empty_like(x)
    _exponential_kernel[(len(x) // 4096,)](x, y, BLOCK=4096, enable_fp_fusion=False)
    x, y, exact = x.cpu(), y.cpu(), x.cpu().double().exp()
    rounded = exact.float()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.isinf(), rounded.isinf())
    ulp = torch.nextafter(rounded, torch.tensor(math.inf)) - rounded
    error = (y.double() - exact).abs() / ulp.double()
    assert error[rounded.isfinite()].max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded_size", [(64, 96), (80, 208)], ids=str)
def test_equals_torchvision(padded_size, dtype):
    h, w = padded_size
    shapes = [(math.ceil(h / s), math.ceil(w / s)) for s in (16, 32, 64, 128, 256)]
    objectness, deltas = make_outputs(1, shapes, dtype)
    logits, indices, _ = select_topk_reference(objectness, ALL)
    size = (h - 7, w - 13)
    boxes, scores = launch(logits, indices, deltas, BASE_ANCHORS, padded_size, torch.tensor([size]), ALL)
    all_boxes, all_logits = torchvision_proposals(objectness, deltas, padded_size, 1)
    starts = torch.tensor([0, *(3 * h * w for h, w in shapes)]).cumsum(0)
    where = torch.cat([i + s for i, s in zip(indices[0].split(starts.diff().tolist()), starts, strict=False)])
    expected = clip_boxes_to_image(all_boxes[0, where], size)
    keep = (expected[:, 2:] - expected[:, :2] >= 1e-3).all(dim=1)
    assert keep.any()
    assert not keep.all()
    expected_scores = torch.where(keep, all_logits[0, where].sigmoid(), -torch.inf)
    assert_close((boxes[0], scores[0]), (torch.where(keep[:, None], expected, 0.0), expected_scores))


@pytest.mark.parametrize(("k", "block"), [(1, 64), (50, 16), (1000, 64)])
def test_equals_the_reference(k, block):
    objectness, deltas = make_outputs(2, SHAPES)
    logits, indices, _ = select_topk_reference(objectness, k)
    sizes = torch.tensor([[64, 96], [33, 40]])
    given = (logits, indices, deltas, BASE_ANCHORS, (64, 96), sizes, k, 4.0, 0.4)
    expected = decode_proposals_reference(*given)
    with mock.patch.object(MODULE, "BLOCK", block):
        assert_close(launch(*given), expected)
    assert expected[1].isinf().any()


@settings(deadline=None, max_examples=8)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5),
    k=st.integers(1, 40),
    size=st.tuples(st.integers(1, 64), st.integers(1, 96)),
    scale=st.floats(0, 20),
    min_size=st.sampled_from([0.0, 1e-3, 16.0]),
    score_thresh=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_levels_equal_the_reference(shapes, k, size, scale, min_size, score_thresh):
    objectness, deltas = make_outputs(1, shapes)
    logits, indices, _ = select_topk_reference(objectness, k)
    anchors = BASE_ANCHORS[: len(shapes)]
    deltas = [scale * level for level in deltas]
    arguments = (logits, indices, deltas, anchors, (64, 96), torch.tensor([size]), k, min_size, score_thresh)
    boxes, scores = launch(*arguments)
    assert_close((boxes, scores), decode_proposals_reference(*arguments))
    assert (boxes >= 0).all()
    assert (boxes[..., 2:] <= torch.tensor(size[::-1])).all()


def test_views_are_read_where_they_are():
    """Channels of a merged head in both memory formats, uneven cells, a column, levels of different dtypes."""
    shapes = [(4, 6), (4, 6), (3, 5), (4, 1), (1, 2)]
    objectness, _ = make_outputs(2, shapes)
    merged = torch.randn(2, 15, 4, 6, generator=seeded())
    deltas = [merged[:, 3:], merged.contiguous(memory_format=torch.channels_last)[:, 3:]]
    deltas += [torch.randn(2, 12, 3, 9)[..., :5], torch.randn(2, 12, 4, 1).half(), torch.randn(2, 12, 1, 2)]
    logits, indices, _ = select_topk_reference(objectness, 30)
    given = (logits, indices, deltas, BASE_ANCHORS, (64, 96), torch.tensor([[64, 96], [50, 60]]), 30, 1e-3, 0.0)
    assert_close(launch(*given), decode_proposals_reference(*given))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_limited_or_dropped(bad):
    deltas = [torch.zeros(1, 12, 1, 2)]
    for channel in range(4):
        deltas[0][0, channel, 0, 0] = bad if channel == 0 else 1.0
        deltas[0][0, 4 + channel, 0, 0] = bad if channel >= 2 else 0.1
        deltas[0][0, 8 + channel, 0, 0] = bad if channel == 1 else 0.1
    logits = torch.tensor([[1.0, 2.0, 3.0, bad, -bad, -0.0]])
    given = (logits, torch.arange(6)[None], deltas, BASE_ANCHORS[:1], (64, 64), torch.tensor([[64, 64]]), 6, 1e-3, 0.0)
    boxes, scores = launch(*given)
    assert boxes.isfinite().all()
    assert_close((boxes, scores), decode_proposals_reference(*given))


def test_thresholds_are_inclusive():
    base = torch.tensor([[[-2.0, -2.0, 2.0, 2.0]]])
    deltas = [torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 4, 1, 1)]  # moved to (2, 2, 6, 6)
    given = (torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), deltas, base, (128, 128), torch.tensor([[9, 9]]))
    for min_size, score_thresh, kept in [(4.0, 0.5, True), (4.001, 0.0, False), (0.0, 0.501, False)]:
        boxes, scores = launch(*given, 1, min_size, score_thresh)
        assert boxes[0, 0].tolist() == ([2, 2, 6, 6] if kept else [0] * 4)
        assert scores.item() == (0.5 if kept else -math.inf)


def test_tied_logits_have_tied_scores():
    logits, indices = torch.randn(1, generator=seeded()).expand(1, 300), torch.arange(300)[None]
    deltas = [torch.zeros(1, 12, 10, 10)]
    _, scores = launch(logits, indices, deltas, BASE_ANCHORS[:1], (800, 800), torch.tensor([[800, 800]]), 300)
    assert len(scores.unique()) == 1


def test_batch_of_none():
    objectness, deltas = make_outputs(0, SHAPES)
    logits, indices, _ = select_topk_reference(objectness, 10)
    boxes, scores = launch(logits, indices, deltas, BASE_ANCHORS, (64, 96), torch.empty(0, 2, dtype=torch.int64), 10)
    assert (boxes.shape, scores.shape) == ((0, logits.shape[1], 4), logits.shape)


def make_real(seed):
    objectness, deltas = make_outputs(2, dtype=torch.float16, seed=seed)
    logits, indices, _ = select_topk_reference(objectness, 1000)
    sizes = torch.tensor([[800, 1201 - seed], [640, 1216]])
    return logits, indices, deltas, BASE_ANCHORS, REAL_SIZE, sizes, 1000, 1e-3, 0.0


@pytest.mark.gpu
def test_real_pyramid():
    assert len(REAL_LEVELS) == len(BASE_ANCHORS)
    assert_close(launch(*make_real(0)), decode_proposals_reference(*make_real(0)))


@pytest.mark.gpu
def test_capturable():
    assert_capturable(launch_decode_proposals, make_real(0), make_real(5))
