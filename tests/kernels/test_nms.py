"""NMS against a greedy loop, torchvision and ONNX NonMaxSuppression; memory when everything overlaps."""

import math
import resource
import sys
import time
from importlib import import_module
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpn_kernels import batched_nms, nms, padded_nms
from tests.kernels.boxes import THRESHOLDS, awkward_boxes, clustered_boxes, greedy_nms, random_boxes, seeded
from tests.kernels.onnx_node import run_node

MODULE = import_module("fpn_kernels.nms")  # the package's attribute of this name is the function
OVERLAPS = import_module("fpn_kernels.overlaps")
FEW = st.sampled_from([0, OVERLAPS.FEW])  # with bands of y, and as few boxes do without


def run(boxes, scores, groups, threshold, max_out=100):
    keep, counts = padded_nms(boxes[None], scores[None], groups[None], threshold, max_out)
    kept = keep[0, : counts[0]].tolist()
    assert keep[0].tolist() == kept + [-1] * (max_out - len(kept))
    return kept


def one_group(boxes):
    return torch.zeros(len(boxes), dtype=torch.int64)


# Areas of one float32 step, so that boxes that share 45 % of their width have an IoU of 1.
TINY = torch.tensor([[0.0, 0.0, 4e-23, 4e-23], [2.2e-23, 0.0, 6.2e-23, 4e-23]])
DIAGONAL = torch.tensor(
    [[0.0, 0.0, 1.0, 1.0], [1.00005, 1.5, 2.0, 3.0]]
)  # apart in x and y: no area, not two negatives


# Blocks of 3 boxes and 5 pairs, so that a few boxes cross every boundary that thousands would.
@settings(deadline=None, max_examples=300)
@given(awkward_boxes(), THRESHOLDS, st.integers(1, 30), st.sampled_from([(3, 5), (1, 1), (2048, 1 << 21)]), FEW)
@example((torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()), 0.5, 1, (2048, 1 << 21), 0)
@example((TINY, torch.ones(2), torch.zeros(2).long()), 0.5, 9, (2048, 1 << 21), 0)
@example((DIAGONAL, torch.ones(2), torch.zeros(2).long()), 0.0, 9, (2048, 1 << 21), 0)
def test_equals_the_greedy_loop(candidates, threshold, max_out, limits, few_boxes):
    few = {"BLOCK": limits[0], "MOST_PAIRS": limits[1], "MOST_ROUNDS": limits[1] % 7}
    with mock.patch.multiple(MODULE, **few), mock.patch.multiple(OVERLAPS, PAIRS=limits[1], FEW=few_boxes):
        assert run(*candidates, threshold, max_out) == greedy_nms(*candidates, threshold, max_out)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 60), st.integers(1, 4), st.sampled_from([2, 7, 25]), FEW)
def test_equals_the_greedy_loop_on_crowds(seed, threshold, count, groups, block, few_boxes):
    boxes = clustered_boxes(count, 1 + count // 8, seed=seed)
    scores = torch.randint(5, (count,), generator=seeded(seed)) / 4
    groups = torch.randint(groups, (count,), generator=seeded(seed))
    with mock.patch.object(MODULE, "BLOCK", block), mock.patch.object(OVERLAPS, "FEW", few_boxes):
        assert run(boxes, scores, groups, threshold, count) == greedy_nms(boxes, scores, groups, threshold, count)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.3, 0.5, 0.7, 0.999, 1.0])
@pytest.mark.parametrize(("block", "few"), [(256, 0), (2048, 0), (2048, OVERLAPS.FEW)])
def test_nms_equals_torchvision(threshold, block, few):
    boxes = torch.cat([clustered_boxes(2500, 60), random_boxes(500, seed=9)])
    scores = torch.randint(200, (3000,), generator=seeded()) / 200  # 15 boxes to a score
    with mock.patch.object(MODULE, "BLOCK", block), mock.patch.object(OVERLAPS, "FEW", few):
        assert torch.equal(nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.floats(0.25, 1), st.floats(-10, 10))
def test_no_pair_is_missed_between_bands(seed, threshold, exponent):
    """Boxes whose IoU with the one of their group is just about the threshold, within it or shifted, at any scale."""
    count = 100
    rand = torch.rand(6, count, generator=seeded(seed), dtype=torch.float64)
    x, y = (rand[:2] - 0.5) * 30
    w, h = 0.1 * 50 ** rand[2:4]
    iou = threshold + (1 - threshold) * rand[4] ** 8 + 1e-6
    inset, shift = (1 - iou) * h * rand[5], (1 - iou) / (1 + iou) * h
    whole = torch.stack([x, y, x + w, y + h], dim=1)
    inner = torch.stack([x, y + inset, x + w, y + inset + iou * h], dim=1)
    shifted = torch.stack([x, y + shift, x + w, y + h + shift], dim=1)
    boxes = torch.cat([whole, inner, shifted])
    boxes = torch.cat([boxes, boxes[:, [1, 0, 3, 2]]]).mul(10**exponent).float()  # along y, then along x
    groups = torch.arange(2 * count).view(2, 1, count).repeat(1, 3, 1).flatten()
    scores = torch.rand(6 * count, generator=seeded(seed))
    expected = set()
    for group in range(2 * count):
        members = (groups == group).nonzero()[:, 0]
        kept = greedy_nms(boxes[members], scores[members], groups[members], threshold, 3)
        expected |= set(members[kept].tolist())
    with mock.patch.object(OVERLAPS, "FEW", 0):
        assert set(batched_nms(boxes, scores, groups, threshold).tolist()) == expected


def test_a_chain_is_walked_along():
    """Each box suppresses the next but for being suppressed itself: every other one stays."""
    steps = torch.arange(30_000, dtype=torch.float32)
    boxes = torch.stack([steps, torch.zeros(30_000), steps + 4, torch.ones(30_000)], dim=1)  # IoU 3/5 with the next
    start = time.thread_time()
    kept = nms(boxes, -steps, 0.5)
    assert time.thread_time() - start < 5.0, "a round for every link would take minutes"
    assert kept.tolist() == list(range(0, 30_000, 2))


def test_batched_nms_equals_torchvision():
    boxes, classes = clustered_boxes(3000, 60), torch.randint(20, (3000,), generator=seeded(1))
    scores = torch.randperm(3000, generator=seeded()) / 3000
    expected = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, classes, 0.5)
    assert torch.equal(batched_nms(boxes, scores, classes, 0.5), expected)
    assert torch.equal(batched_nms(boxes, scores, classes.to(torch.int32), 0.5), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.7])
def test_nms_equals_onnx(threshold):
    boxes = torch.stack([clustered_boxes(600, 20, seed=i) for i in range(2)])
    scores = torch.randint(100, (2, 600), generator=seeded()) / 100
    limits = np.array([1000], dtype=np.int64), np.array([threshold], dtype=np.float32)
    selected = run_node("NonMaxSuppression", boxes.numpy(), scores[:, None].numpy(), *limits, opset=11)[0]
    for i in range(2):
        expected = selected[selected[:, 0] == i, 2]
        assert nms(boxes[i], scores[i], threshold).tolist() == expected.tolist()


HALF = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0]])  # IoU exactly 1/2


@pytest.mark.parametrize(
    ("boxes", "fraction"),
    [
        (HALF, 1 / 2),
        (torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 7.0, 10.0]]), 7 / 10),
        (torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 3.0]]), 3 / 10),
        (torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 0.0, 3.0, 1.0]]), 1 / 3),
        (torch.tensor([[1.0, 2.0, 5.0, 6.0], [1.0, 2.0, 5.0, 6.0]]), 1.0),
        (torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 8.0, 4.0]]), 0.0),
    ],
)
def test_iou_exactly_at_the_threshold_is_kept(boxes, fraction):
    scores = torch.tensor([0.5, 0.5])
    assert run(boxes, scores, one_group(boxes), fraction) == [0, 1]
    if fraction > 0:
        assert run(boxes, scores, one_group(boxes), fraction - 1e-6) == [0]


def test_tied_scores_prefer_the_lower_index():
    boxes = HALF[[0]].repeat(5, 1)
    assert run(boxes, torch.tensor([0.1, 0.7, 0.7, -0.0, 0.7]), one_group(boxes), 0.5) == [1]
    assert run(boxes, torch.tensor([-0.0, 0.0, 0.0, -0.0, -0.0]), one_group(boxes), 1.0) == [0, 1, 2, 3, 4]


def test_nan_and_infinity_drop_only_their_own_box():
    boxes, scores = HALF[[0]].repeat(6, 1), torch.tensor([0.9, math.nan, 0.8, 0.7, -math.inf, 0.6])
    boxes[0, 2], boxes[2, 0], boxes[5] = math.inf, math.nan, torch.tensor([50.0, 50, 60, 60])
    assert run(boxes, scores, one_group(boxes), 0.5) == [3, 5]


def test_boxes_without_area_neither_suppress_nor_die():
    boxes = torch.tensor([[0.0, 0, 9, 9], [1, 1, 1, 8], [1, 1, 1, 8], [8, 8, 1, 1], [8, 1, 1, 8], [1, 1, 8, 8]])
    scores = torch.tensor([0.1, 0.9, 0.8, 0.7, 0.6, 0.05])
    assert run(boxes, scores, one_group(boxes), 0.5) == [1, 2, 3, 4, 0]


def test_far_away_classes_and_coordinates_do_not_touch():
    boxes = torch.tensor([[0.0, 0, 4, 4]]).repeat(4, 1)
    boxes[3] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    assert run(boxes, torch.ones(4), torch.tensor([10**9, 10**9 + 1, 10**9, 1]), 0.5) == [0, 1, 3]
    assert run(boxes[[0] * 4], torch.ones(4), torch.tensor([0, 2**62, -(2**62), 2**62]), 0.5) == [0, 1, 2]


def test_max_out_is_a_prefix():
    boxes, scores = clustered_boxes(500, 100), torch.rand(500, generator=seeded())
    groups = torch.randint(3, (500,), generator=seeded())
    everything = run(boxes, scores, groups, 0.5, 500)
    assert len(everything) > 100
    for block in (16, 2048):
        with mock.patch.object(MODULE, "BLOCK", block):
            assert run(boxes, scores, groups, 0.5, 100) == everything[:100]
            assert run(boxes, scores, groups, 0.5, 1) == everything[:1]


def test_batch_equals_alone():
    boxes = torch.stack([clustered_boxes(400, 20, seed=i) for i in range(4)])
    scores = torch.randint(10, (4, 400), generator=seeded()) / 10
    scores[1], scores[2, ::3] = -math.inf, -math.inf
    groups = torch.randint(5, (4, 400), generator=seeded())
    keep, counts = padded_nms(boxes, scores, groups, 0.5, 60)
    assert counts[1] == 0
    for i in range(4):
        alone = padded_nms(boxes[i : i + 1], scores[i : i + 1], groups[i : i + 1], 0.5, 60)
        assert torch.equal(keep[i], alone[0][0])
        assert torch.equal(counts[i], alone[1][0])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_keep(shape):
    keep, counts = padded_nms(torch.zeros(*shape, 4), torch.zeros(shape), torch.zeros(shape).long(), 0.5, 7)
    assert (keep.dtype, counts.dtype) == (torch.int64, torch.int64)
    assert torch.equal(keep, torch.full((shape[0], 7), -1))
    assert torch.equal(counts, torch.zeros(shape[0]).long())
    for kept in (nms(torch.zeros(0, 4), torch.zeros(0), 0.5), batched_nms(torch.zeros(0, 4), *torch.zeros(2, 0), 0.5)):
        assert (kept.shape, kept.dtype) == ((0,), torch.int64)


def test_a_hundred_thousand_boxes_equal_torchvision():
    boxes = torch.cat([clustered_boxes(50_000, 200), random_boxes(50_000)])
    scores = torch.randperm(100_000, generator=seeded()) / 100_000
    classes = torch.randint(80, (100_000,), generator=seeded())
    kept = batched_nms(boxes, scores, classes, 0.5)
    assert torch.equal(kept, torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, classes, 0.5))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_stays_bounded_when_all_boxes_coincide():
    boxes, scores = HALF[[0]].repeat(20_000, 1), torch.rand(20_000, generator=seeded())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert nms(boxes, scores, 0.5).tolist() == [scores.argmax()]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500 * 1024, "20,000 x 20,000 IoUs alone would take 1.6 GB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(1, 3, 5)}, "boxes must have shape"),
        ({"boxes": torch.zeros(2, 3, 4)}, "boxes must have shape"),
        ({"boxes": torch.zeros(1, 3, 4).half()}, "boxes must be float32"),
        ({"scores": torch.zeros(3)}, "scores must have shape"),
        ({"scores": torch.zeros(1, 3).double()}, "scores must be float32"),
        ({"groups": torch.zeros(1, 2).long()}, "groups must have shape"),
        ({"groups": torch.zeros(1, 3)}, "groups must be int64"),
        ({"groups": torch.zeros(1, 3, device="meta").long()}, "one device"),
        ({"iou_threshold": -0.1}, "iou_threshold must be from 0 to 1"),
        ({"iou_threshold": 1.1}, "iou_threshold must be from 0 to 1"),
        ({"iou_threshold": math.nan}, "iou_threshold must be from 0 to 1"),
        ({"max_out": 0}, "max_out must be at least 1"),
        ({"largest_group": -1}, "largest_group must be at least 0"),
    ],
    ids=str,
)
def test_rejects(change, message):
    valid = {"boxes": torch.zeros(1, 3, 4), "scores": torch.zeros(1, 3), "groups": torch.zeros(1, 3).long()}
    with pytest.raises(ValueError, match=message):
        padded_nms(**valid | {"iou_threshold": 0.5, "max_out": 5} | change)


@pytest.mark.parametrize("boxes", [torch.zeros(0), torch.zeros(3, 5), torch.zeros(2, 4)], ids=str)
def test_batched_nms_rejects(boxes):
    with pytest.raises(ValueError, match="must have shape"):
        batched_nms(boxes, torch.zeros(3), torch.zeros(3).long(), 0.5)
