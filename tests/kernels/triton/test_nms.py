"""NMS on the device against the greedy loop, torchvision and ONNX NonMaxSuppression."""

from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fpn_kernels.nms import padded_nms_reference
from fpn_kernels.triton.nms import launch_padded_nms
from tests.kernels.boxes import (
    REAL_LEVELS,
    THRESHOLDS,
    awkward_boxes,
    clustered_boxes,
    greedy_nms,
    random_boxes,
    seeded,
)
from tests.kernels.onnx_node import run_node
from tests.kernels.test_nms import DIAGONAL, TINY
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MODULE = import_module("fpn_kernels.triton.nms")
# Large tiles, since the interpreter's time goes with the programs, not with their size.
WIDE = {
    "RANK_ROWS": 512, "OVERLAP_ROWS": 256, "OVERLAP_COLUMNS": 256, "SUPPRESS_ROWS": 256, "SUPPRESS_COLUMNS": 256,
}  # fmt: skip


@contextmanager
def blocks(block, chunk, counted=32768):
    """Boxes resolved at a time, boxes of a chunk, and above how many boxes sorting ranks them; tiles that fit."""
    tile = min(block, 256)
    if DEVICE.type == "cuda":
        tile = min(block, 32)
    tiles = dict.fromkeys(WIDE, tile)
    with mock.patch.multiple(MODULE, BLOCK=block, CHUNK=chunk, COUNTED=counted, **tiles):
        yield


def launch(boxes, scores, groups, threshold, max_out):
    arguments = (boxes.to(DEVICE), scores.to(DEVICE), groups.to(DEVICE), threshold, max_out)
    keep, counts = (part.cpu() for part in launch_padded_nms(*arguments))
    for row, count in zip(keep, counts.tolist(), strict=True):
        assert (row[:count] >= 0).all()
        assert (row[count:] == -1).all()
    return keep, counts


def run(boxes, scores, groups, threshold, max_out):
    keep, counts = launch(boxes[None], scores[None], groups[None], threshold, max_out)
    return keep[0, : counts[0]].tolist()


@settings(deadline=None, max_examples=30)
@given(awkward_boxes(most=40), THRESHOLDS, st.integers(1, 50), st.sampled_from([(32, 32, 99), (32, 64, 0)]))
@example((TINY, torch.ones(2), torch.zeros(2).long()), 0.5, 9, (32, 32, 99))
@example((DIAGONAL, torch.ones(2), torch.zeros(2).long()), 0.0, 9, (32, 32, 99))
def test_awkward_boxes_equal_the_greedy_loop(candidates, threshold, max_out, limits):
    with blocks(*limits):
        assert run(*candidates, threshold, max_out) == greedy_nms(*candidates, threshold, max_out)


@pytest.mark.parametrize("limits", [(32, 32), (32, 128), (64, 64), (256, 256), (32, 64, 0), (256, 256, 0)])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_crowds_across_blocks_and_chunks(limits, threshold):
    boxes, scores = clustered_boxes(150, 20), torch.randint(5, (150,), generator=seeded()) / 4
    groups = torch.randint(3, (150,), generator=seeded())
    expected = greedy_nms(boxes, scores, groups, threshold, 150)
    with blocks(*limits):
        assert run(boxes, scores, groups, threshold, 150) == expected


def test_the_sizes_that_are_launched():
    """No constant patched; overlap bits beyond a box's own word are never written and must never count."""
    boxes = torch.stack([clustered_boxes(300, 40, seed=i) for i in range(2)])
    scores = torch.randint(20, (2, 300), generator=seeded()) / 20
    groups = torch.randint(3, (2, 300), generator=seeded())
    with mock.patch.multiple(MODULE, **({} if DEVICE.type == "cuda" else {"OVERLAP_ROWS": 64})):
        keep, counts = launch(boxes, scores, groups, 0.5, 300)
    for i in range(2):
        assert keep[i, : counts[i]].tolist() == greedy_nms(boxes[i], scores[i], groups[i], 0.5, 300)


@pytest.mark.parametrize("counted", [32768, 1000])
def test_thousands_of_ties(counted):
    """One score; many boxes coincide. The lowest index of each place stays."""
    places = random_boxes(40, largest=30, seed=1)
    index = torch.randint(40, (2000,), generator=seeded())
    first = [(index == i).nonzero()[0].item() for i in range(40)]
    alone = greedy_nms(places, -torch.tensor(first).float(), torch.zeros(40).long(), 0.3, 40)
    with mock.patch.multiple(MODULE, COUNTED=counted, CHUNK=1024, **({} if DEVICE.type == "cuda" else WIDE)):
        kept = run(places[index], torch.full((2000,), 0.25), torch.zeros(2000).long(), 0.3, 100)
    assert kept == [first[i] for i in alone]


@pytest.mark.parametrize(("max_out", "limits"), [(1, (32, 32)), (20, (32, 128)), (33, (32, 32)), (64, (32, 128))])
def test_max_out_is_a_prefix_and_stops(max_out, limits):
    boxes, scores = clustered_boxes(200, 100), torch.rand(200, generator=seeded())
    groups = torch.randint(3, (200,), generator=seeded())
    everything = greedy_nms(boxes, scores, groups, 0.5, 200)
    assert len(everything) > 64
    with blocks(*limits):
        assert run(boxes, scores, groups, 0.5, max_out) == everything[:max_out]


def test_images_do_not_meet():
    boxes = torch.stack([clustered_boxes(70, 10, seed=i) for i in range(4)])
    scores = torch.randint(10, (4, 70), generator=seeded()) / 10
    scores[1], scores[2, ::3], boxes[3, ::2, 1] = -torch.inf, -torch.inf, torch.nan
    groups = torch.randint(5, (4, 70), generator=seeded())
    with blocks(32, 64):
        keep, counts = launch(boxes, scores, groups, 0.5, 30)
    assert counts[1] == 0
    for i in range(4):
        assert keep[i, : counts[i]].tolist() == greedy_nms(boxes[i], scores[i], groups[i], 0.5, 30)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.7, 1.0])
def test_equals_torchvision_and_onnx(threshold):
    boxes, scores = clustered_boxes(400, 20), torch.randint(200, (400,), generator=seeded()) / 200
    with blocks(128, 256):
        kept = run(boxes, scores, torch.zeros(400).long(), threshold, 400)
    assert kept == torchvision.ops.nms(boxes, scores, threshold).tolist()
    limits = np.array([1000], dtype=np.int64), np.array([threshold], dtype=np.float32)
    selected = run_node("NonMaxSuppression", boxes[None].numpy(), scores[None, None].numpy(), *limits, opset=11)[0]
    assert kept == selected[:, 2].tolist()


@pytest.mark.parametrize("score", [0.5, -torch.inf, torch.nan])
def test_a_single_box(score):
    """Sizes of 1, which Triton would take for constants."""
    with blocks(32, 32):
        kept = run(torch.tensor([[1.0, 2.0, 5.0, 6.0]]), torch.tensor([score]), torch.tensor([7]), 0.5, 1)
    assert kept == ([0] if score == 0.5 else [])


@pytest.mark.parametrize("counted", [32768, 0])
def test_mostly_nan(counted):
    boxes, scores = clustered_boxes(300, 20), torch.randint(5, (300,), generator=seeded()) / 4
    spoilt = torch.rand(300, 5, generator=seeded(1)) < 0.4
    boxes[spoilt[:, :4]], scores[spoilt[:, 4]] = torch.nan, torch.nan
    with blocks(64, 128, counted):
        kept = run(boxes, scores, torch.zeros(300).long(), 0.5, 300)
    assert 0 < len(kept) < (~spoilt.any(dim=1)).sum() < 40
    assert kept == greedy_nms(boxes, scores, torch.zeros(300).long(), 0.5, 300)


def test_long_chains_settle():
    """Each box overlaps only its neighbours, so that every second one stays: as many rounds as a block has boxes."""
    x = torch.arange(100, dtype=torch.float32)
    boxes = torch.stack([x, 0 * x, x + 1.8, 0 * x + 1], dim=1)
    with blocks(64, 64):
        assert run(boxes, -x, torch.zeros(100).long(), 0.2, 100) == list(range(0, 100, 2))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_keep(shape):
    keep, counts = launch(torch.zeros(*shape, 4), torch.zeros(shape), torch.zeros(shape).long(), 0.5, 7)
    assert torch.equal(keep, torch.full((shape[0], 7), -1))
    assert torch.equal(counts, torch.zeros(shape[0]).long())


def make_real(seed, k=None):
    """The proposals of two images, or ``k`` candidates of 90 classes, as NMS meets them."""
    slots = [min(1000, 3 * h * w) for h, w in REAL_LEVELS]
    levels = torch.arange(5).repeat_interleave(torch.tensor(slots))
    count = k or sum(slots)
    boxes = torch.stack([clustered_boxes(count, 60, seed=seed + i) for i in range(2)])
    scores = torch.randint(2000, (2, count), generator=seeded(seed)) / 2000
    groups = torch.randint(90, (2, count), generator=seeded(seed)) if k else levels.expand(2, -1)
    scores[1, count // 2 :] = -torch.inf
    return boxes, scores, groups, 0.5 if k else 0.7, 100 if k else 1000


@pytest.mark.gpu
@pytest.mark.parametrize("k", [None, 20_000, 40_000])
def test_real_proposals_and_candidates(k):
    given = make_real(0, k)
    for actual, expected in zip(launch(*given), padded_nms_reference(*given), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [None, 20_000])
def test_capturable(k):
    assert_capturable(launch_padded_nms, make_real(0, k), make_real(7, k))
