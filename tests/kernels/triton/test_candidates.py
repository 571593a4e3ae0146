"""Candidates on the device against the reference, a loop and, with NMS behind them, torchvision's RoIHeads."""

import math
from importlib import import_module
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import RoIHeads

from fpn_kernels import candidate_capacity
from fpn_kernels.candidates import select_candidates_reference
from fpn_kernels.nms import padded_nms_reference
from fpn_kernels.triton.candidates import launch_select_candidates
from tests.kernels.boxes import REAL_SIZE, seeded
from tests.kernels.test_candidates import WEIGHTS, by_loop, make_head
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MODULE = import_module("fpn_kernels.triton.candidates")
EPS = torch.finfo(torch.float32).eps


def launch(logits, deltas, proposals, counts, sizes, score_thresh=0.05, min_size=1e-2, weights=WEIGHTS, capacity=None):
    if capacity is None:
        capacity = candidate_capacity(proposals.shape[1], logits.shape[1], score_thresh)
    tensors = (part.to(DEVICE) for part in (logits, deltas, proposals, counts, sizes))
    return tuple(part.cpu() for part in launch_select_candidates(*tensors, score_thresh, min_size, weights, capacity))


def assert_close(actual, expected):
    """The same slots and, where a box is kept, the same values but for the rounding of exp and of the softmax's sum."""
    boxes, scores, labels, filled = actual
    assert torch.equal(labels, expected[2])
    assert torch.equal(filled, expected[3])
    assert torch.equal(scores.isinf(), expected[1].isinf())
    torch.testing.assert_close(scores, expected[1], rtol=8 * EPS, atol=0)
    torch.testing.assert_close(boxes, expected[0], rtol=2 * EPS, atol=3 * EPS * 1000)


def assert_equals_reference(*given):
    *tensors, capacity = given
    expected = select_candidates_reference(*tensors, capacity)
    assert_close(launch(*tensors, capacity), expected)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("classes", "score_thresh"), [(1, 0.5), (3, 0.0), (20, 0.05), (20, 1.0)])
def test_equals_the_loop(classes, score_thresh, dtype):
    counts, sizes = torch.tensor([12, 0, 5]), [(800, 1216), (700, 900), (30, 40)]
    logits, deltas, proposals = make_head(3, 12, classes, dtype=dtype)
    boxes, scores, labels, filled = launch(logits, deltas, proposals, counts, torch.tensor(sizes), score_thresh)
    for i, size in enumerate(sizes):
        rows = slice(12 * i, 12 * (i + 1))
        expected = list(by_loop(logits[rows], deltas[rows], proposals[i], counts[i], size, score_thresh, 1e-2))
        number = len(expected)
        assert filled[i] == number
        assert labels[i, :number].tolist() == [label for label, _, _ in expected]
        assert scores[i, :number].tolist() == pytest.approx([score for _, score, _ in expected], rel=1e-6)
        wanted = torch.stack([*(box for *_, box in expected), torch.zeros(4)])[:-1]
        torch.testing.assert_close(boxes[i, :number], wanted, rtol=2 * EPS, atol=3 * EPS * 1000)
        assert boxes[i, number:].count_nonzero() == 0
        assert (scores[i, number:] == -torch.inf).all()
        assert (labels[i, number:] == 1).all()


@pytest.mark.parametrize(("tile", "capacity"), [(1024, 500), (32, 0), (32, 1), (32, 37), (8, 500)])
def test_blocks_and_capacities(tile, capacity):
    """RoIs over several programs, counts over several reads, slots that overflow and that stay empty."""
    head = make_head(2, 21, 3, sharpness=1.0)
    sizes = torch.tensor([REAL_SIZE, (500, 600)])
    with mock.patch.multiple(MODULE, TILE=tile, SUMMED=8):
        assert_equals_reference(*head, torch.tensor([21, 18]), sizes, 0.2, 1e-2, WEIGHTS, capacity)


@settings(deadline=None, max_examples=8)
@given(
    classes=st.integers(1, 12),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    score_thresh=st.floats(0, 1),
    sharpness=st.floats(0, 4),
    capacity=st.integers(0, 40),
)
def test_any_head_equals_the_loop(classes, counts, score_thresh, sharpness, capacity):
    logits, deltas, proposals = make_head(len(counts), 9, classes, sharpness=sharpness)
    softmax = logits.softmax(dim=1)[:, 1:]
    score_thresh = softmax.flatten()[(softmax.flatten() - score_thresh).abs().argmin()].item() * (1 - 1e-5)
    sizes = [(300 + 100 * i, 700) for i in range(len(counts))]
    found = launch(
        logits, deltas, proposals, torch.tensor(counts), torch.tensor(sizes), score_thresh, capacity=capacity
    )
    for i, (*rows, number) in enumerate(zip(*found, strict=True)):
        part = slice(9 * i, 9 * (i + 1))
        every = by_loop(logits[part], deltas[part], proposals[i], counts[i], sizes[i], score_thresh, 1e-2)
        expected = list(every)[:capacity]
        assert number == len(expected)
        for slot, (label, score, box) in enumerate(expected):
            assert rows[2][slot] == label
            assert rows[1][slot].item() == pytest.approx(score, rel=1e-6)
            torch.testing.assert_close(rows[0][slot], box, rtol=2 * EPS, atol=3 * EPS * 1000)


def test_score_threshold_is_exclusive_and_min_size_inclusive():
    logits, deltas = torch.zeros(2, 2), torch.zeros(2, 8)
    proposals = torch.tensor([[[10.0, 10.0, 50.0, 50.0], [10.0, 10.0, 50.0, 49.99]]])
    images = (torch.tensor([2]), torch.tensor([[100, 100]]))
    assert launch(logits, deltas, proposals, *images, 0.5)[3] == 0
    boxes, scores, *_ = launch(logits, deltas, proposals, *images, 0.4999, 40.0)
    assert boxes.tolist() == [[[10, 10, 50, 50], [0, 0, 0, 0]]]
    assert scores.tolist() == [[0.5, -math.inf]]


def test_a_merged_head_is_read_where_it_is():
    logits, deltas, proposals = make_head(1, 9, 4)
    merged = torch.cat([logits, deltas], dim=1)
    given = (torch.tensor([9]), torch.tensor([REAL_SIZE]), 0.05, 1e-2, (1.0, 1.0, 1.0, 1.0), 36)
    assert_equals_reference(merged[:, :5], merged[:, 5:], proposals, *given)
    columns = torch.empty_strided(merged.shape, (1, len(merged))).copy_(merged)
    assert_equals_reference(columns[:, :5], columns[:, 5:], proposals, *given)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of numpy, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_limited_or_dropped(bad):
    logits, deltas, proposals = make_head(1, 12, 3)
    logits[0, 2] = logits[1, 0] = logits[2] = bad
    logits[3] = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf])
    for roi, channel in enumerate(range(4), start=4):
        deltas[roi, channel::4] = bad
        proposals[0, roi + 4, channel] = bad
    expected = assert_equals_reference(
        logits, deltas, proposals, torch.tensor([12]), torch.tensor([REAL_SIZE]), 0.01, 1e-2, WEIGHTS, 36
    )
    assert expected[0].isfinite().all()


@pytest.mark.parametrize(("n", "r"), [(0, 5), (2, 0), (0, 0), (2, 5)])
@pytest.mark.parametrize("capacity", [0, 6])
def test_nothing_found(n, r, capacity):
    counts, sizes = torch.zeros(n, dtype=torch.int64), torch.full((n, 2), 100)
    assert_equals_reference(*make_head(n, r, 3), counts, sizes, 0.05, 1e-2, WEIGHTS, capacity)


@pytest.mark.parametrize("counts", [(40, 40), (40, 17)], ids=str)
def test_detections_equal_torchvision(counts):
    sizes = [(800, 1201), (640, 1216)]
    logits, deltas, proposals = make_head(2, 40, 6)
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, WEIGHTS, 0.05, 0.5, 100)
    real = torch.cat([torch.arange(40) < count for count in counts])
    trimmed = [boxes[:count] for boxes, count in zip(proposals, counts, strict=True)]
    expected = heads.postprocess_detections(logits[real], deltas[real], trimmed, sizes)
    boxes, scores, labels, _ = launch(logits, deltas, proposals, torch.tensor(counts), torch.tensor(sizes))
    keep, kept = padded_nms_reference(boxes, scores, labels, 0.5, 100)
    for i in range(2):
        chosen = keep[i, : kept[i]]
        assert torch.equal(labels[i, chosen], expected[2][i])
        torch.testing.assert_close(scores[i, chosen], expected[1][i], rtol=8 * EPS, atol=0)
        torch.testing.assert_close(boxes[i, chosen], expected[0][i], rtol=2 * EPS, atol=3 * EPS * 1000)


def make_real(seed):
    head = make_head(2, 1000, 90, dtype=torch.float16, seed=seed)
    generator = seeded(seed)
    counts = torch.randint(1, 1001, (2,), generator=generator)
    return *head, counts, torch.tensor([(800, 1201 - seed), (640, 1216)]), 0.05, 1e-2, WEIGHTS, 20_000


@pytest.mark.gpu
def test_real_head():
    given = make_real(0)
    boxes, scores, labels, filled = launch(*given)
    expected = select_candidates_reference(*given)
    assert (filled - expected[3]).abs().max() <= 1, "a score at the threshold may fall on either side of it"
    if torch.equal(filled, expected[3]):
        assert_close((boxes, scores, labels, filled), expected)


@pytest.mark.gpu
def test_capturable():
    assert_capturable(launch_select_candidates, make_real(0), make_real(3))
