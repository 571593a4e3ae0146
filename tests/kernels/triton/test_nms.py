"""NMS on the device against the greedy loop, torchvision and ONNX NonMaxSuppression."""

from contextlib import contextmanager
from functools import partial
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
ORDER = import_module("fpn_kernels.triton.nms_order")
CHUNKS = import_module("fpn_kernels.triton.nms_chunks")
# Large tiles, since the interpreter's time goes with the programs, not with their size.
WIDE = {"OVERLAP_ROWS": 256, "OVERLAP_COLUMNS": 32, "EMIT_ROWS": 512}
WIDE_ORDER = {"BUCKET_TILE": 512, "RANK_ROWS": 256}
WIDE_CHUNKS = {"OVERLAP_ROWS": 256, "OVERLAP_COLUMNS": 256, "SUPPRESS_ROWS": 256, "SUPPRESS_COLUMNS": 256}


@contextmanager
def wide():
    """The tiles that suit the device; blocks as they are launched."""
    if DEVICE.type == "cuda":
        yield
        return
    with (
        mock.patch.multiple(MODULE, **WIDE),
        mock.patch.multiple(ORDER, **WIDE_ORDER),
        mock.patch.multiple(CHUNKS, **WIDE_CHUNKS),
    ):
        yield


@contextmanager
def blocks(block, span=32, programs=1024):
    """Boxes resolved at a time, places to a program that resolves, programs of other launches; tiles that fit."""
    tiles = {"OVERLAP_ROWS": 64, "EMIT_ROWS": 32, "EMIT_COLUMNS": 32}
    order = {"BUCKET_TILE": 32, "RANK_ROWS": 32, "RANK_COLUMNS": 64, "RANK_ROUNDS": 2}
    with (
        mock.patch.multiple(MODULE, BLOCK=block, SPAN=span, PROGRAMS=programs, **tiles),
        mock.patch.multiple(ORDER, **order),
    ):
        yield


@contextmanager
def chunks(block, chunk):
    """No room for overlap bits; boxes resolved at a time and of a chunk, tiles that fit."""
    tile = min(block, 32 if DEVICE.type == "cuda" else 256)
    tiles = dict.fromkeys(WIDE_CHUNKS, tile)
    with (
        mock.patch.object(MODULE, "MOST_WORDS", 0),
        mock.patch.multiple(CHUNKS, BLOCK=block, CHUNK=chunk, GATHER_ROWS=64, **tiles),
    ):
        yield


WAYS = {
    "spans of 32": partial(blocks, 32),
    "one program to a launch": partial(blocks, 64, 128, 1),
    "programs of an image": partial(blocks, 256, 32, 3),
    "chunks of 32": partial(chunks, 32, 32),
    "chunks of 64": partial(chunks, 32, 64),
    "chunks of 128": partial(chunks, 64, 128),
    "chunks of 256": partial(chunks, 256, 256),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def launch(boxes, scores, groups, threshold, max_out, largest_group=None):
    arguments = (boxes.to(DEVICE), scores.to(DEVICE), groups.to(DEVICE), threshold, max_out, largest_group)
    keep, counts = (part.cpu() for part in launch_padded_nms(*arguments))
    for row, count in zip(keep, counts.tolist(), strict=True):
        assert (row[:count] >= 0).all()
        assert (row[count:] == -1).all()
    return keep, counts


def run(boxes, scores, groups, threshold, max_out, largest_group=None):
    keep, counts = launch(boxes[None], scores[None], groups[None], threshold, max_out, largest_group)
    return keep[0, : counts[0]].tolist()


def count_largest(groups):
    return int(groups.unique(return_counts=True)[1].max())


@settings(deadline=None, max_examples=40)
@given(awkward_boxes(most=40), THRESHOLDS, st.integers(1, 50), st.sampled_from(list(WAYS.values())))
@example((TINY, torch.ones(2), torch.zeros(2).long()), 0.5, 9, WAYS["spans of 32"])
@example((DIAGONAL, torch.ones(2), torch.zeros(2).long()), 0.0, 9, WAYS["spans of 32"])
def test_awkward_boxes_equal_the_greedy_loop(candidates, threshold, max_out, way):
    with way():
        assert run(*candidates, threshold, max_out) == greedy_nms(*candidates, threshold, max_out)


@each_way
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_crowds_across_blocks_and_chunks(way, threshold):
    boxes, scores = clustered_boxes(150, 20), torch.randint(5, (150,), generator=seeded()) / 4
    groups = torch.randint(3, (150,), generator=seeded())
    with way():
        kept = run(boxes, scores, groups, threshold, 150)
    assert kept == greedy_nms(boxes, scores, groups, threshold, 150)


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("sizes", [(1, 31, 32, 33, 64), (200,), (96, 1, 1, 1, 96), (1,) * 70, (63, 65, 40), (5, 190)])
def test_groups_across_spans_and_blocks(sizes, block):
    """Of one to 200 boxes, begun anywhere in a word, a span and a block; most programs have none or several."""
    order = torch.randperm(sum(sizes), generator=seeded())
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[order]
    boxes, scores = clustered_boxes(len(order), 8), torch.randint(9, (len(order),), generator=seeded(1)) / 8
    expected = greedy_nms(boxes, scores, groups, 0.4, len(order))
    with blocks(block, 32):
        assert run(boxes, scores, groups, 0.4, len(order)) == expected
        assert run(boxes, scores, groups, 0.4, len(order), max(sizes)) == expected


# Low bits are the bucket: these share buckets, differ in high bits alone, have the sign bit, or mix to the largest.
GROUPS = [
    [0, 64, 128, -64], [5, 5 + 2**40, 5 - 2**63, 5 + 2**62], [2**63 - 1, -(2**63), -1, 0], [-33, 31, 95, -1],
    list(range(-50, 50)),
]  # fmt: skip


@pytest.mark.parametrize("values", GROUPS, ids=str)
def test_any_values_of_groups(values):
    groups = torch.tensor(values)[torch.randint(len(values), (180,), generator=seeded())]
    boxes, scores = clustered_boxes(180, 6), torch.randint(9, (180,), generator=seeded(1)) / 8
    expected = greedy_nms(boxes, scores, groups, 0.4, 180)
    with blocks(32):
        assert run(boxes, scores, groups, 0.4, 180, count_largest(groups)) == expected
    with blocks(32), mock.patch.object(ORDER, "BUCKET_BITS", 1):
        assert run(boxes, scores, groups, 0.4, 180) == expected


@pytest.mark.parametrize("count", [31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_counts_around_the_borders_of_blocks(count):
    boxes, scores = clustered_boxes(count, 5), torch.randint(9, (count,), generator=seeded()) / 8
    groups = torch.zeros(count).long()
    with blocks(64, 64):
        kept = run(boxes, scores, groups, 0.5, count, count)
    assert kept == greedy_nms(boxes, scores, groups, 0.5, count)


def test_few_present_of_many_slots():
    boxes, scores = torch.zeros(1, 3000, 4), torch.full((1, 3000), -torch.inf)
    groups = torch.ones(1, 3000).long()
    at = torch.randperm(3000, generator=seeded())[:150].sort().values
    boxes[0, at], scores[0, at] = clustered_boxes(150, 8), torch.rand(150, generator=seeded())
    groups[0, at] = torch.randint(1, 20, (150,), generator=seeded())
    with wide():
        kept = run(boxes[0], scores[0], groups[0], 0.5, 100, 150)
    assert kept == greedy_nms(boxes[0], scores[0], groups[0], 0.5, 100)


def test_a_group_larger_than_promised_stays_in_its_memory():
    """Its results are not NMS, but they are boxes, each once, and those of other groups are as ever."""
    boxes, scores = clustered_boxes(300, 5), torch.randint(9, (300,), generator=seeded()) / 8
    groups = (torch.rand(300, generator=seeded()) < 0.1).long()
    with blocks(64):
        kept = run(boxes, scores, groups, 0.5, 300, 40)
        assert kept == run(boxes, scores, groups, 0.5, 300, 40)
    assert len(set(kept)) == len(kept)
    expected = greedy_nms(boxes, scores, groups, 0.5, 300)
    assert [i for i in kept if groups[i] == 1] == [i for i in expected if groups[i] == 1]
    assert set(kept) >= {expected[0]}


@pytest.mark.parametrize("room", [1 << 24, 0], ids=["at once", "in chunks"])
def test_the_sizes_that_are_launched(room):
    """No size patched, but for larger tiles of chunks, whose programs take the interpreter long.

    Overlap bits beyond a box's own word are never written and must never count.
    """
    boxes = torch.stack([clustered_boxes(300, 40, seed=i) for i in range(2)])
    scores = torch.randint(20, (2, 300), generator=seeded()) / 20
    groups = torch.randint(3, (2, 300), generator=seeded())
    rows = CHUNKS.OVERLAP_ROWS if DEVICE.type == "cuda" else 64
    with mock.patch.object(MODULE, "MOST_WORDS", room), mock.patch.object(CHUNKS, "OVERLAP_ROWS", rows):
        keep, counts = launch(boxes, scores, groups, 0.5, 300)
    for i in range(2):
        assert keep[i, : counts[i]].tolist() == greedy_nms(boxes[i], scores[i], groups[i], 0.5, 300)


@pytest.mark.parametrize("room", [1 << 24, 0], ids=["at once", "in chunks"])
def test_thousands_of_ties(room):
    """One score; many boxes coincide. The lowest index of each place stays."""
    places = random_boxes(40, largest=30, seed=1)
    index = torch.randint(40, (2000,), generator=seeded())
    first = [(index == i).nonzero()[0].item() for i in range(40)]
    alone = greedy_nms(places, -torch.tensor(first).float(), torch.zeros(40).long(), 0.3, 40)
    with wide(), mock.patch.object(MODULE, "MOST_WORDS", room), mock.patch.object(CHUNKS, "CHUNK", 1024):
        kept = run(places[index], torch.full((2000,), 0.25), torch.zeros(2000).long(), 0.3, 100)
    assert kept == [first[i] for i in alone]


@each_way
@pytest.mark.parametrize("max_out", [1, 20, 33, 64])
def test_max_out_is_a_prefix_and_stops(max_out, way):
    boxes, scores = clustered_boxes(200, 100), torch.rand(200, generator=seeded())
    groups = torch.randint(3, (200,), generator=seeded())
    everything = greedy_nms(boxes, scores, groups, 0.5, 200)
    assert len(everything) > 64
    with way():
        assert run(boxes, scores, groups, 0.5, max_out) == everything[:max_out]


@each_way
def test_images_do_not_meet(way):
    boxes = torch.stack([clustered_boxes(70, 10, seed=i) for i in range(4)])
    scores = torch.randint(10, (4, 70), generator=seeded()) / 10
    scores[1], scores[2, ::3], boxes[3, ::2, 1] = -torch.inf, -torch.inf, torch.nan
    groups = torch.randint(5, (4, 70), generator=seeded())
    with way():
        keep, counts = launch(boxes, scores, groups, 0.5, 30)
    assert counts[1] == 0
    for i in range(4):
        assert keep[i, : counts[i]].tolist() == greedy_nms(boxes[i], scores[i], groups[i], 0.5, 30)


def test_groups_that_images_share():
    """One row of levels for all images, expanded."""
    boxes = torch.stack([clustered_boxes(70, 10, seed=i) for i in range(3)])
    scores, levels = torch.rand(3, 70, generator=seeded()), torch.arange(5).repeat_interleave(14)
    with blocks(32):
        keep, counts = launch(boxes, scores, levels.expand(3, -1), 0.5, 70, 14)
    for i in range(3):
        assert keep[i, : counts[i]].tolist() == greedy_nms(boxes[i], scores[i], levels, 0.5, 70)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.7, 1.0])
def test_equals_torchvision_and_onnx(threshold):
    boxes, scores = clustered_boxes(400, 20), torch.randint(200, (400,), generator=seeded()) / 200
    with blocks(128, 128):
        kept = run(boxes, scores, torch.zeros(400).long(), threshold, 400)
    assert kept == torchvision.ops.nms(boxes, scores, threshold).tolist()
    limits = np.array([1000], dtype=np.int64), np.array([threshold], dtype=np.float32)
    selected = run_node("NonMaxSuppression", boxes[None].numpy(), scores[None, None].numpy(), *limits, opset=11)[0]
    assert kept == selected[:, 2].tolist()


@each_way
@pytest.mark.parametrize("score", [0.5, -torch.inf, torch.nan])
def test_a_single_box(score, way):
    """Sizes of 1, which Triton would take for constants."""
    with way():
        kept = run(torch.tensor([[1.0, 2.0, 5.0, 6.0]]), torch.tensor([score]), torch.tensor([7]), 0.5, 1)
    assert kept == ([0] if score == 0.5 else [])


@each_way
def test_mostly_nan(way):
    boxes, scores = clustered_boxes(300, 20), torch.randint(5, (300,), generator=seeded()) / 4
    spoilt = torch.rand(300, 5, generator=seeded(1)) < 0.4
    boxes[spoilt[:, :4]], scores[spoilt[:, 4]] = torch.nan, torch.nan
    with way():
        kept = run(boxes, scores, torch.zeros(300).long(), 0.5, 300)
    assert 0 < len(kept) < (~spoilt.any(dim=1)).sum() < 40
    assert kept == greedy_nms(boxes, scores, torch.zeros(300).long(), 0.5, 300)


@each_way
def test_long_chains_settle(way):
    """Each box overlaps only its neighbours, so that every second one stays: as many rounds as a block has boxes."""
    x = torch.arange(100, dtype=torch.float32)
    boxes = torch.stack([x, 0 * x, x + 1.8, 0 * x + 1], dim=1)
    with way():
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
    return boxes, scores, groups, 0.5 if k else 0.7, 100 if k else 1000, None if k == 40_000 else 1000


@pytest.mark.gpu
@pytest.mark.parametrize("k", [None, 20_000, 40_000])
def test_real_proposals_and_candidates(k):
    given = make_real(0, k)
    for actual, expected in zip(launch(*given), padded_nms_reference(*given), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [None, 20_000, 40_000])
def test_capturable(k):
    assert_capturable(launch_padded_nms, make_real(0, k), make_real(7, k))
