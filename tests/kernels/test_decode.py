"""Anchors and decoding against torchvision's AnchorGenerator, BoxCoder and RegionProposalNetwork."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image

from fpn_kernels import decode_proposals, make_base_anchors, padded_nms, select_topk
from tests.kernels.boxes import REAL_LEVELS, REAL_SIZE, seeded

RATIOS = (0.5, 1.0, 2.0)
SIZES = ((32,), (64,), (128,), (256,), (512,))
BASE_ANCHORS = torch.stack([make_base_anchors(size, RATIOS) for size in SIZES])
ALL = 10**6  # more than any level has


def make_outputs(n, shapes=REAL_LEVELS, dtype=torch.float32, seed=0):
    """Objectness whose sigmoids are all different, and deltas, of every level."""
    counts = [3 * h * w for h, w in shapes]
    total = n * sum(counts)
    order = torch.randperm(total, generator=seeded(seed))
    logits = torch.linspace(-4, 4, total)[order].view(n, sum(counts)).split(counts, dim=1)
    objectness = [v.view(n, h, w, 3).permute(0, 3, 1, 2) for v, (h, w) in zip(logits, shapes, strict=True)]
    deltas = [0.4 * torch.randn(n, 12, h, w, generator=seeded(seed + 1)) for h, w in shapes]
    return objectness, [level.to(dtype) for level in deltas]


def torchvision_proposals(objectness, deltas, padded_size, n):
    """All decoded boxes (N, K, 4), not clipped, and logits (N, K), in torchvision's order."""
    images = ImageList(torch.empty(n, 3, *padded_size, device="meta"), [padded_size] * n)
    deltas = [level.float() for level in deltas]
    anchors = AnchorGenerator(SIZES, (RATIOS,) * 5)(images, deltas)
    logits, flat = concat_box_prediction_layers(objectness, deltas)
    boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(flat, anchors)
    return boxes.view(n, -1, 4), logits.view(n, -1)


def assert_same_scores(actual, expected):
    """The same but for the rounding of exp and of the division."""
    torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded_size", [REAL_SIZE, (32, 64), (416, 1056)], ids=str)
def test_every_anchor_decodes_as_in_torchvision(padded_size, dtype):
    h, w = padded_size
    shapes = [(math.ceil(h / s), math.ceil(w / s)) for s in (4, 8, 16, 32, 64)]
    objectness, deltas = make_outputs(1, shapes, dtype)
    logits, indices, _ = select_topk(objectness, ALL)
    image_size = (h - 7, w - 13)
    boxes, scores = decode_proposals(
        logits, indices, deltas, BASE_ANCHORS, padded_size, torch.tensor([image_size]), k=ALL
    )
    all_boxes, all_logits = torchvision_proposals(objectness, deltas, padded_size, 1)
    starts = torch.tensor([0, *(3 * h * w for h, w in shapes)]).cumsum(0)
    where = torch.cat([i + s for i, s in zip(indices[0].split(starts.diff().tolist()), starts, strict=False)])
    expected = clip_boxes_to_image(all_boxes[0, where], image_size)
    keep = (expected[:, 2:] - expected[:, :2] >= 1e-3).all(dim=1)
    assert keep.any()
    assert not keep.all()
    assert torch.equal(boxes[0], torch.where(keep[:, None], expected, 0.0))
    assert_same_scores(scores[0], torch.where(keep, all_logits[0, where].sigmoid(), -torch.inf))


@pytest.mark.parametrize("score_thresh", [0.0, 0.9])
def test_proposals_equal_torchvision(score_thresh):
    sizes = [(800, 1201), (640, 1216)]
    objectness, deltas = make_outputs(2)
    rpn = RegionProposalNetwork(
        None, None, 0.7, 0.3, 256, 0.5, {"testing": 1000}, {"testing": 1000}, 0.7, score_thresh
    ).eval()
    counts = [3 * h * w for h, w in REAL_LEVELS]
    all_boxes, all_logits = torchvision_proposals(objectness, deltas, REAL_SIZE, 2)
    expected = rpn.filter_proposals(all_boxes, all_logits, sizes, counts)

    logits, indices, levels = select_topk(objectness, 1000)
    boxes, scores = decode_proposals(
        logits, indices, deltas, BASE_ANCHORS, REAL_SIZE, torch.tensor(sizes), k=1000, score_thresh=score_thresh
    )
    keep, kept = padded_nms(boxes, scores, levels.expand(2, -1), 0.7, 1000)
    for i in range(2):
        chosen = keep[i, : kept[i]]
        assert torch.equal(boxes[i, chosen], expected[0][i])
        assert_same_scores(scores[i, chosen], expected[1][i])


def decode_one(deltas, logit=0.0, **options):
    """One 4 x 4 anchor at (0, 0) of a 1 x 1 level, in an image of 100 x 100."""
    base = torch.tensor([[[-2.0, -2.0, 2.0, 2.0]]])
    level = torch.tensor(deltas, dtype=torch.float32).view(1, 4, 1, 1)
    index = torch.zeros(1, 1, dtype=torch.int64)
    sizes = torch.tensor([[100, 100]])
    boxes, scores = decode_proposals(torch.tensor([[logit]]), index, [level], base, (128, 128), sizes, k=1, **options)
    return boxes[0, 0].tolist(), scores[0, 0].item()


DROPPED = ([0, 0, 0, 0], -math.inf)


def test_thresholds_are_inclusive():
    inside = [1.0, 1.0, 0.0, 0.0]  # moved to (2, 2, 6, 6)
    assert decode_one(inside, min_size=4.0) == ([2, 2, 6, 6], 0.5)
    assert decode_one(inside, min_size=4.001) == DROPPED
    assert decode_one(inside, score_thresh=0.5) == ([2, 2, 6, 6], 0.5)
    assert decode_one(inside, score_thresh=0.501) == DROPPED
    assert decode_one([0.0, 0.0, 0.0, 0.0]) == ([0, 0, 2, 2], 0.5), "clipped"
    assert decode_one([-9.0, 0.0, 0.0, 0.0]) == DROPPED, "outside"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channel", range(4))
def test_non_finite_deltas_never_leave_a_non_finite_box(bad, channel):
    deltas = [1.0, 1.0, 0.0, 0.0]
    deltas[channel] = bad
    result = decode_one(deltas)
    if channel >= 2 and bad == math.inf:
        assert all(0 <= side <= 100 for side in result[0]), "limited and clipped"
        assert result[1] == 0.5
    else:
        assert result == DROPPED


def test_nan_logit_is_dropped():
    assert decode_one([1.0, 1.0, 0.0, 0.0], logit=math.nan) == DROPPED
    assert decode_one([1.0, 1.0, 0.0, 0.0], logit=-math.inf) == ([2, 2, 6, 6], 0.0), "a score of 0 is a score"


def test_tied_logits_have_tied_scores():
    base, deltas = BASE_ANCHORS[:1], torch.zeros(1, 12, 40, 40)
    for logit in torch.randn(20, generator=seeded()).tolist():
        logits, indices = torch.full((1, 4800), logit), torch.arange(4800)[None]
        _, scores = decode_proposals(logits, indices, [deltas], base, (800, 800), torch.tensor([[800, 800]]), k=4800)
        assert len(scores.unique()) == 1


def test_batch_equals_alone():
    shapes, sizes = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)], torch.tensor([[60, 90], [64, 96], [33, 40]])
    objectness, deltas = make_outputs(3, shapes)

    def run(part):
        logits, indices, _ = select_topk([level[part] for level in objectness], 50)
        return decode_proposals(
            logits, indices, [level[part] for level in deltas], BASE_ANCHORS, (64, 96), sizes[part], k=50
        )

    boxes, scores = run(slice(None))
    for i in range(3):
        alone_boxes, alone_scores = run(slice(i, i + 1))
        assert torch.equal(boxes[i], alone_boxes[0])
        assert torch.equal(scores[i], alone_scores[0])


def test_batch_of_none():
    objectness, deltas = make_outputs(0, [(2, 3)] * 5)
    logits, indices, _ = select_topk(objectness, 10)
    none = torch.empty(0, 2, dtype=torch.int64)
    boxes, scores = decode_proposals(logits, indices, deltas, BASE_ANCHORS, (64, 96), none, k=10)
    assert (boxes.shape, boxes.dtype) == ((0, 50, 4), torch.float32)
    assert (scores.shape, scores.dtype) == ((0, 50), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(12)}, "logits must have shape"),
        ({"logits": torch.zeros(1, 12).double()}, "logits must be float32"),
        ({"logits": torch.zeros(1, 11)}, "indices must have shape"),
        ({"indices": torch.zeros(1, 12, dtype=torch.int32)}, "indices must be int64"),
        ({"deltas": []}, "at least one level"),
        ({"deltas": [torch.zeros(1, 12, 2, 2)] * 2}, "base_anchors must have shape"),
        ({"deltas": [torch.zeros(1, 13, 2, 2)]}, "deltas must have shape"),
        ({"deltas": [torch.zeros(2, 12, 2, 2)]}, "deltas must have shape"),
        ({"deltas": [torch.zeros(1, 12, 2, 2).double()]}, "deltas must be float32"),
        ({"deltas": [torch.zeros(1, 12, 3, 3)]}, "logits must have 20 slots"),
        ({"deltas": [torch.zeros(1, 12, 2, 2, device="meta")]}, "one device"),
        ({"k": 11}, "logits must have 11 slots"),
        ({"base_anchors": torch.zeros(1, 3, 5)}, "base_anchors must have shape"),
        ({"image_sizes": torch.zeros(2, 2, dtype=torch.int64)}, "image_sizes must have shape"),
        ({"image_sizes": torch.zeros(1, 2)}, "image_sizes must be int64"),
    ],
    ids=str,
)
def test_rejects(change, message):
    arguments = {
        "logits": torch.zeros(1, 12),
        "indices": torch.zeros(1, 12, dtype=torch.int64),
        "deltas": [torch.zeros(1, 12, 2, 2)],
        "base_anchors": torch.zeros(1, 3, 4),
        "padded_size": (64, 64),
        "image_sizes": torch.tensor([[64, 64]]),
        "k": 20,
    } | change
    with pytest.raises(ValueError, match=message):
        decode_proposals(**arguments)
