"""Candidates against a loop and, with NMS behind them, against torchvision's RoIHeads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import RoIHeads

from fpn_kernels import candidate_capacity, clip_boxes, decode_boxes, padded_nms, select_candidates
from tests.kernels.boxes import REAL_SIZE, random_boxes, seeded

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def make_head(n, r, classes, *, sharpness=3.0, dtype=torch.float32, seed=0):
    """What a head of ``classes`` classes and background says about n * r proposals: logits, deltas, proposals."""
    logits = sharpness * torch.randn(n * r, classes + 1, generator=seeded(seed))
    deltas = 2 * torch.randn(n * r, 4 * (classes + 1), generator=seeded(seed + 1))
    proposals = clip_boxes(random_boxes(n * r, seed=seed).view(n, r, 4), torch.tensor([REAL_SIZE]).expand(n, -1))
    return logits.to(dtype), deltas.to(dtype), proposals


def by_loop(logits, deltas, proposals, count, size, score_thresh, min_size):
    """One image's candidates, one after another; None where the box is too small."""
    for roi in range(count):
        scores = logits[roi].float().softmax(dim=0)
        for label in range(1, len(scores)):
            if scores[label] > score_thresh:
                box = decode_boxes(proposals[roi], deltas[roi].view(-1, 4)[label].float(), WEIGHTS)
                box = clip_boxes(box[None, None], torch.tensor([size]))[0, 0]
                large = bool((box[2:] - box[:2] >= min_size).all())
                yield label, scores[label].item() if large else -math.inf, box if large else torch.zeros(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score_thresh", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("classes", [1, 3, 20])
def test_equals_the_loop(classes, score_thresh, dtype):
    counts, sizes = torch.tensor([12, 0, 5]), [(800, 1216), (700, 900), (30, 40)]
    logits, deltas, proposals = make_head(3, 12, classes, dtype=dtype)
    boxes, scores, labels, filled = select_candidates(
        logits, deltas, proposals, counts, torch.tensor(sizes), score_thresh=score_thresh
    )
    assert boxes.shape[1] == candidate_capacity(12, classes + 1, score_thresh)
    for i, size in enumerate(sizes):
        rows = slice(12 * i, 12 * (i + 1))
        expected = list(by_loop(logits[rows], deltas[rows], proposals[i], counts[i], size, score_thresh, 1e-2))
        assert filled[i] == len(expected)
        assert labels[i, : len(expected)].tolist() == [label for label, _, _ in expected]
        assert scores[i, : len(expected)].tolist() == pytest.approx([score for _, score, _ in expected], rel=1e-6)
        assert torch.equal(
            boxes[i, : len(expected)], torch.stack([*(box for *_, box in expected), torch.zeros(4)])[:-1]
        )
        assert boxes[i, len(expected) :].count_nonzero() == 0
        assert (scores[i, len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("counts", [(200, 200), (200, 77)], ids=str)
def test_detections_equal_torchvision(counts):
    sizes = [(800, 1201), (640, 1216)]
    logits, deltas, proposals = make_head(2, 200, 20)
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, WEIGHTS, 0.05, 0.5, 100)
    real = torch.cat([torch.arange(200) < count for count in counts])
    trimmed = [boxes[:count] for boxes, count in zip(proposals, counts, strict=True)]
    expected = heads.postprocess_detections(logits[real], deltas[real], trimmed, sizes)

    boxes, scores, labels, _ = select_candidates(logits, deltas, proposals, torch.tensor(counts), torch.tensor(sizes))
    keep, kept = padded_nms(boxes, scores, labels, 0.5, 100)
    for i in range(2):
        chosen = keep[i, : kept[i]]
        assert torch.equal(labels[i, chosen], expected[2][i])
        assert torch.equal(scores[i, chosen], expected[1][i])
        assert torch.equal(boxes[i, chosen], expected[0][i])


def select_one(logits, deltas=(0.0, 0.0, 0.0, 0.0), proposal=(10.0, 10.0, 50.0, 50.0), **options):
    """One RoI in an image of 100 x 100, the same deltas for every class."""
    logits = torch.tensor([logits])
    deltas = torch.tensor([deltas]).repeat(1, logits.shape[1])
    one, sizes = torch.ones(1, dtype=torch.int64), torch.tensor([[100, 100]])
    return select_candidates(logits, deltas, torch.tensor([[proposal]]), one, sizes, **options)


def test_score_threshold_is_exclusive():
    assert select_one([0.0, 0.0], score_thresh=0.5)[3] == 0
    assert select_one([0.0, 0.0], score_thresh=0.4999)[3] == 1
    assert select_one([0.0, 200.0], score_thresh=1.0)[3] == 0
    assert select_one([200.0, 0.0], score_thresh=0.0)[3] == 0, "a score of 0 does not exceed 0"


def test_min_size_is_inclusive():
    assert select_one([0.0, 5.0], min_size=40.0)[0].tolist() == [[[10, 10, 50, 50]]]
    boxes, scores, labels, counts = select_one([0.0, 5.0], min_size=40.01)
    assert (boxes.tolist(), scores.tolist(), labels.tolist()) == ([[[0] * 4]], [[-math.inf]], [[1]])
    assert counts == 1, "a dropped candidate keeps its slot"
    assert select_one([0.0, 5.0], proposal=(0.0, 0.0, 0.0, 0.0))[1] == -math.inf, "an empty proposal"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channel", range(4))
def test_non_finite_deltas_never_leave_a_non_finite_box(bad, channel):
    deltas = [0.0] * 4
    deltas[channel] = bad
    boxes, scores, _, counts = select_one([0.0, 5.0], deltas)
    assert counts == 1
    assert boxes.isfinite().all()
    limited = channel >= 2 and bad == math.inf
    assert (scores == -torch.inf).all() == (not limited)


def test_non_finite_logits_and_proposals():
    assert select_one([0.0, math.nan])[3] == 0
    assert select_one([0.0, math.inf])[3] == 0, "softmax of infinity is NaN"
    assert select_one([-math.inf, 0.0])[1].tolist() == [[1.0]]
    assert select_one([0.0, 5.0], proposal=(10.0, 10.0, math.nan, 50.0))[1] == -math.inf


def test_huge_deltas_are_limited():
    boxes, *_ = select_one([0.0, 5.0], (0.0, 0.0, 1e30, 1e30), (50.0, 50.0, 51.0, 51.0), min_size=0.0)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([19.25, 19.25, 81.75, 81.75]))


def test_what_exceeds_the_capacity_is_lost_from_the_end():
    head, counts, sizes = make_head(2, 20, 5), torch.tensor([20, 20]), torch.tensor([REAL_SIZE] * 2)
    whole = select_candidates(*head, counts, sizes)
    for capacity in (0, 1, 10):
        part = select_candidates(*head, counts, sizes, capacity=capacity)
        assert (whole[3] > capacity).all()
        assert part[3].tolist() == [capacity] * 2
        for some, every in zip(part[:3], whole[:3], strict=True):
            assert torch.equal(some, every[:, :capacity])


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0, 1), st.floats(0, 4))
def test_the_default_capacity_suffices(seed, classes, score_thresh, sharpness):
    logits, deltas, proposals = make_head(1, 8, classes, sharpness=sharpness, seed=seed)
    logits[:, 0] = -math.inf  # all the score to the classes
    count, sizes = torch.tensor([8]), torch.tensor([REAL_SIZE])
    *_, filled = select_candidates(logits, deltas, proposals, count, sizes, score_thresh=score_thresh)
    assert filled == (logits.softmax(dim=1)[:, 1:] > score_thresh).sum()


def test_capacity():
    assert candidate_capacity(1000, 91, 0.05) == 20_000
    assert candidate_capacity(1000, 4, 0.05) == 3000
    assert candidate_capacity(1000, 91, 0.0) == 90_000
    assert candidate_capacity(0, 91, 0.05) == 0


def test_batch_equals_alone():
    logits, deltas, proposals = make_head(3, 30, 7)
    counts, sizes = torch.tensor([30, 11, 29]), torch.tensor([[800, 1216], [500, 600], [64, 64]])
    together = select_candidates(logits, deltas, proposals, counts, sizes)
    for i in range(3):
        rows, image = slice(30 * i, 30 * (i + 1)), slice(i, i + 1)
        alone = select_candidates(logits[rows], deltas[rows], proposals[image], counts[image], sizes[image])
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part[0], whole[i])


@pytest.mark.parametrize("capacity", [None, 0, 6])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (2, 5)], ids=str)
def test_nothing_found(shape, capacity):
    n, r = shape
    counts, sizes = torch.zeros(n, dtype=torch.int64), torch.full((n, 2), 100)
    boxes, scores, labels, filled = select_candidates(*make_head(n, r, 3), counts, sizes, capacity=capacity)
    slots = 3 * r if capacity is None else capacity
    assert [(tuple(t.shape), t.dtype) for t in (boxes, scores, labels, filled)] == [
        ((n, slots, 4), torch.float32),
        ((n, slots), torch.float32),
        ((n, slots), torch.int64),
        ((n,), torch.int64),
    ]
    assert (scores == -torch.inf).all()
    assert boxes.count_nonzero() + filled.count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_logits": torch.zeros(5, 4)}, "class_logits must have shape"),
        ({"class_logits": torch.zeros(6, 1), "box_deltas": torch.zeros(6, 4)}, "at least one class"),
        ({"class_logits": torch.zeros(6, 4).double()}, "class_logits must be float32"),
        ({"box_deltas": torch.zeros(6, 12)}, "box_deltas must have shape"),
        ({"box_deltas": torch.zeros(6, 16).double()}, "box_deltas must be float32"),
        ({"box_deltas": torch.zeros(6, 16, device="meta")}, "one device"),
        ({"proposals": torch.zeros(6, 4)}, "proposals must have shape"),
        ({"proposals": torch.zeros(2, 3, 4).half()}, "proposals must be float32"),
        ({"counts": torch.zeros(3).long()}, "counts must have shape"),
        ({"counts": torch.zeros(2)}, "counts must be int64"),
        ({"image_sizes": torch.zeros(1, 2).long()}, "image_sizes must have shape"),
        ({"image_sizes": torch.zeros(2, 2)}, "image_sizes must be int64"),
        ({"weights": (10.0, 5.0)}, "weights must be four numbers"),
        ({"score_thresh": -0.1}, "score_thresh must be from 0 to 1"),
        ({"score_thresh": math.nan}, "score_thresh must be from 0 to 1"),
        ({"capacity": -1}, "capacity must not be negative"),
    ],
    ids=str,
)
def test_rejects(change, message):
    head = {"class_logits": torch.zeros(6, 4), "box_deltas": torch.zeros(6, 16), "proposals": torch.zeros(2, 3, 4)}
    images = {"counts": torch.tensor([3, 3]), "image_sizes": torch.tensor([[9, 9], [9, 9]])}
    with pytest.raises(ValueError, match=message):
        select_candidates(**head | images | change)
