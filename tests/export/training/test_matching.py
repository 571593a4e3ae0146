"""Matching and sampling by hand-worked cases."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou as torchvision_box_iou

from fpn_export.training.losses import encode_boxes
from fpn_export.training.matching import BACKGROUND, IGNORED, box_iou, match_boxes
from fpn_export.training.sampling import sample_balanced
from fpn_kernels import decode_boxes

OBJECTS = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]])


def row(*intervals: tuple[float, float]) -> torch.Tensor:
    """Boxes of height 10 over these stretches of x."""
    return torch.tensor([[a, 0.0, b, 10.0] for a, b in intervals])


def test_iou_is_torchvisions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 2, 2, generator=generator).sort(dim=1).values.flatten(1) for n in (30, 40))
    torch.testing.assert_close(box_iou(a, b), torchvision_box_iou(a, b))


def test_thresholds_and_the_band_between() -> None:
    # IoU with the first object: 1, 0.7 exactly, 0.5, 0.3 exactly, 0.2; then with the second 0.9.
    boxes = row((0, 10), (0, 7), (0, 5), (0, 3), (0, 2), (20, 29))
    matched = match_boxes(OBJECTS, boxes, 0.3, 0.7)
    expected = [0, IGNORED, IGNORED, IGNORED, BACKGROUND, 1]
    iou = box_iou(OBJECTS, boxes)[0]
    expected[1] = 0 if iou[1] >= 0.7 else IGNORED
    expected[3] = BACKGROUND if iou[3] < 0.3 else IGNORED
    assert matched.tolist() == expected


def test_every_object_is_learned_by_its_best_boxes() -> None:
    boxes = row((0, 2), (8, 10), (40, 50), (20, 21))
    assert match_boxes(OBJECTS, boxes, 0.3, 0.7).tolist() == [BACKGROUND] * 4
    # Two equally good boxes for the first object, one poor box for the second, none for the third box.
    assert match_boxes(OBJECTS, boxes, 0.3, 0.7, keep_best=True).tolist() == [0, 0, BACKGROUND, 1]


def test_an_object_that_no_box_overlaps_is_not_learned() -> None:
    boxes = row((100, 110), (200, 210))
    assert match_boxes(OBJECTS, boxes, 0.3, 0.7, keep_best=True).tolist() == [BACKGROUND] * 2


def test_without_objects_all_is_background() -> None:
    assert match_boxes(torch.zeros(0, 4), row((0, 1), (1, 2)), 0.3, 0.7).tolist() == [BACKGROUND] * 2


@pytest.mark.parametrize(
    ("positives", "negatives", "drawn"),
    [(1000, 1000, (128, 128)), (10, 1000, (10, 246)), (1000, 10, (128, 10)), (0, 5, (0, 5)), (0, 0, (0, 0))],
)
def test_sampling_keeps_its_proportions(positives: int, negatives: int, drawn: tuple[int, int]) -> None:
    matched = torch.cat([torch.zeros(positives), torch.full((negatives,), BACKGROUND), torch.full((50,), IGNORED)]).to(
        torch.int64
    )
    chosen, background = sample_balanced(matched, 256, 0.5, torch.Generator().manual_seed(0))
    assert (len(chosen), len(background)) == drawn
    assert (matched[chosen] == 0).all()
    assert (matched[background] == BACKGROUND).all()
    for indices in (chosen, background):
        assert torch.equal(indices, indices.unique())


def test_encoding_is_undone_by_decoding() -> None:
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(2, 50, 2, generator=generator) * 100
    boxes, objects = (torch.cat([c, c + 5 + 50 * torch.rand(50, 2, generator=generator)], dim=1) for c in corners)
    weights = (10.0, 10.0, 5.0, 5.0)
    torch.testing.assert_close(decode_boxes(boxes, encode_boxes(objects, boxes, weights), weights), objects)
