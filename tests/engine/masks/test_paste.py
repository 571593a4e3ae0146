"""Pasting against interpolate on whole regions, by hand at their edges, and what leaves the image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fpn_engine.masks.paste import paste_in_chunks, paste_in_regions, paste_masks, scale_regions
from fpn_engine.masks.run_lengths import encode_masks, encode_region


def paste_plainly(mask, region, size):
    """One pixel after another."""
    cells, (x1, y1, x2, y2) = mask.shape[0], region
    probabilities = mask.double().sigmoid()
    out = torch.zeros(size, dtype=torch.bool)
    for y in range(size[0]):
        for x in range(size[1]):
            u, v = (x + 0.5 - x1) / (x2 - x1) * cells, (y + 0.5 - y1) / (y2 - y1) * cells
            if 0 <= u < cells and 0 <= v < cells:
                u, v = min(max(u - 0.5, 0), cells - 1), min(max(v - 0.5, 0), cells - 1)
                left, top = min(int(u), cells - 2), min(int(v), cells - 2)
                fx, fy = u - left, v - top
                (a, b), (c, d) = probabilities[top : top + 2, left : left + 2].tolist()
                out[y, x] = a * (1 - fx) * (1 - fy) + b * fx * (1 - fy) + c * (1 - fx) * fy + d * fx * fy >= 0.5
    return out


def test_equals_interpolate_where_the_region_is_the_image():
    masks = torch.randn(3, 14, 14, generator=torch.Generator().manual_seed(0))
    regions = torch.tensor([[0.0, 0, 40, 30]]).expand(3, 4)
    expected = F.interpolate(masks.sigmoid()[None], size=(30, 40), mode="bilinear", align_corners=False)[0] >= 0.5
    assert torch.equal(paste_masks(masks, regions, (30, 40)), expected)


def test_equals_one_pixel_after_another():
    generator = torch.Generator().manual_seed(1)
    masks = torch.randn(6, 7, 7, generator=generator) * 3
    corners = torch.rand(6, 2, generator=generator) * 40 - 10
    regions = torch.cat([corners, corners + 5 + 25 * torch.rand(6, 2, generator=generator)], dim=1)
    pasted = paste_masks(masks, regions, (31, 37))
    for found, mask, region in zip(pasted, masks, regions.tolist(), strict=True):
        assert (found != paste_plainly(mask, region, (31, 37))).sum() <= 1, "rounding at the threshold"
    assert pasted.any(dim=2).any(dim=1).sum() > 3


def test_a_pixel_belongs_where_its_centre_does():
    masks = torch.full((1, 2, 2), 5.0)
    pasted = paste_masks(masks, torch.tensor([[1.5, 0.6, 3.5, 2.5]]), (4, 5))
    assert pasted[0].int().tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_threshold():
    masks = torch.tensor([[[0.3, 0.7]]]).logit()
    region = torch.tensor([[0.0, 0, 2, 1]])
    assert paste_masks(masks, region, (1, 2)).tolist() == [[[False, True]]]
    assert paste_masks(masks, region, (1, 2), 0.2).tolist() == [[[True, True]]]
    assert paste_masks(masks, region, (1, 2), 0.8).tolist() == [[[False, False]]]


def test_chunks_are_columns_of_the_same(monkeypatch):
    masks = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(2))
    regions = torch.tensor([[2.0, 3, 20, 18]]).expand(5, 4)
    expected = paste_masks(masks, regions, (20, 24))
    monkeypatch.setattr("fpn_engine.masks.paste.CHUNK_CELLS", 2 * 20 * 24)
    parts = list(paste_in_chunks(masks, regions, (20, 24)))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts).transpose(1, 2), expected)
    assert torch.equal(paste_masks(masks, regions, (20, 24)), expected)


def test_regions_alone_give_the_same_run_lengths():
    generator = torch.Generator().manual_seed(3)
    masks = torch.randn(60, 14, 14, generator=generator) * 3
    masks[:5] = 9.0  # columns from head to foot, which run on into each other
    corners = torch.rand(60, 2, generator=generator) * 60 - 20
    regions = torch.cat([corners, corners + 70 * torch.rand(60, 2, generator=generator)], dim=1)
    regions[0] = torch.tensor([-5.0, -5, 60, 60])
    regions[1] = torch.tensor([10.0, -9, 20.5, 99])
    expected = encode_masks(paste_masks(masks, regions, (31, 37)).numpy())
    found = [encode_region(mask, x, y, (31, 37)) for x, y, mask in paste_in_regions(masks, regions, (31, 37))]
    assert found == expected
    assert len({one["counts"] for one in found}) > 40


@pytest.mark.parametrize(
    ("mask", "region"),
    [
        (torch.full((1, 3, 3), 9.0), [50.0, 50, 60, 60]),
        (torch.full((1, 3, 3), 9.0), [-20.0, -20, -1, -1]),
        (torch.full((1, 3, 3), torch.nan), [0.0, 0, 9, 9]),
        (torch.full((1, 3, 3), 9.0), [3.0, 3, 3, 3]),
        (torch.full((1, 3, 3), 9.0), [torch.nan, 0, 9, 9]),
    ],
    ids=["beyond", "before", "nan mask", "no area", "nan region"],
)
def test_nothing_to_see(mask, region):
    assert not paste_masks(mask, torch.tensor([region]), (10, 12)).any()
    [(x, y, found)] = paste_in_regions(mask, torch.tensor([region]), (10, 12))
    assert encode_region(found, x, y, (10, 12)) == encode_masks(np.zeros((1, 10, 12), bool))[0]


def test_none():
    assert paste_masks(torch.zeros(0, 14, 14), torch.zeros(0, 4), (10, 12)).shape == (0, 10, 12)


def test_regions_of_the_original():
    scaled = scale_regions(torch.tensor([[10.0, 20, 30, 40]]), (400, 600), (200, 900))
    assert scaled.tolist() == [[15, 10, 45, 20]]
