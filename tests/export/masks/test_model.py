"""Sparse equals dense: scores and masks at the winners are those of the fully convolutional evaluation."""

import pytest
import torch

from fpn_engine.masks.pipeline import MaskPipeline
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.masks.winners import select_winners
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.variants import VARIANTS, make_variant
from tests.export.masks.tiny import random_images, tiny_model, tiny_spec


def choose_densely(model, images, k):
    """The k best (score, level, y, x, head) of each image, one number after another, and their masks."""
    scores, masks = model.dense(images)
    chosen = []
    for image in range(len(images)):
        rows = [
            (-score, level, y, x, head)
            for level, part in enumerate(scores)
            for head, plane in enumerate(part[image].tolist())
            for y, row in enumerate(plane)
            for x, score in enumerate(row)
        ]
        chosen.append(sorted(rows)[:k])
    size = model.spec.mask_size
    picked = [
        torch.stack([masks[level][image, head, :, y, x].view(size, size) for _, level, y, x, head in rows])
        for image, rows in enumerate(chosen)
    ]
    return chosen, torch.stack(picked)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_sparse_equals_dense(variant):
    model = tiny_model(**{f: getattr(make_variant(tiny_spec(), variant), f) for f in ("heads", "mask_size")})
    images = random_images()
    found = model.pipeline(images)
    rows, masks = choose_densely(model, images, 100)
    assert found.masks.std() > 0.1, "else all masks would be alike"
    torch.testing.assert_close(found.masks, masks, rtol=0, atol=1e-4)
    scores = torch.tensor([[-row[0] for row in image] for image in rows]).sigmoid()
    torch.testing.assert_close(found.scores, scores, rtol=0, atol=1e-4)
    winners = select_winners(model.trunk(images).scores, 100)
    assert winners.places[:, :, 1:].tolist() == [[list(row[1:4]) for row in image] for image in rows]
    assert winners.heads.tolist() == [[row[4] for row in image] for image in rows]
    for image, image_rows in enumerate(rows):
        for slot, (_, level, y, x, head) in enumerate(image_rows):
            side = 40 * 2**level * (2**0.5 if model.spec.heads[head].kernel == 7 else 1)
            centre_x, centre_y = x * 4 * 2**level, y * 4 * 2**level
            box = [centre_x - side / 2, centre_y - side / 2, centre_x + side / 2, centre_y + side / 2]
            assert found.regions[image, slot].tolist() == pytest.approx(box)


@torch.no_grad()
def test_the_heads_score_what_they_answer():
    model, images = tiny_model(), random_images()
    out = model.trunk(images)
    winners = select_winners(out.scores, 1000)
    for number in range(2):
        own = winners.heads == number
        assert own.any()
        scores, _ = model.head(number, out.features, winners.places[own])
        torch.testing.assert_close(scores, winners.logits[own], rtol=0, atol=1e-4)


@torch.no_grad()
def test_fixed_shapes_give_the_same():
    model, images = tiny_model(), random_images()
    fixed = MaskPipeline(model.spec, model.trunk, model.answer, fixed_shapes=True)
    for found, expected in zip(fixed(images), model.pipeline(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_image_is_what_it_is_alone():
    model, images = tiny_model(), random_images(3)
    together = model.pipeline(images)
    for i in range(3):
        alone = model.pipeline(images[i : i + 1])
        torch.testing.assert_close(alone.scores[0], together.scores[i], rtol=0, atol=1e-5)


@torch.no_grad()
def test_fewer_locations_than_masks():
    model = tiny_model(masks_per_img=10**6)
    found = model.pipeline(random_images(1, 32, 32))
    assert found.scores.shape == (1, 2 * (64 + 16 + 4 + 1 + 1))
    assert model.pipeline(random_images(1, 32, 32), limit=7).masks.shape == (1, 7, 14, 14)


@torch.no_grad()
def test_a_spoilt_image_is_told():
    model, images = tiny_model(), random_images()
    images[1, 0, 5, 5] = torch.nan
    assert model.pipeline(images).status.tolist() == [0, 1]


def test_the_default_is_the_papers():
    with torch.device("meta"):
        model = FpnMasks(MaskSpec())
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters() if name.startswith("mask_heads")}
    assert shapes["mask_heads.0.conv.weight"] == (512, 128, 5, 5)
    assert shapes["mask_heads.1.conv.weight"] == (512, 128, 7, 7)
    assert shapes["mask_heads.0.mask.weight"] == (196, 512, 1, 1)
    assert shapes["mask_heads.0.score.weight"] == (1, 512, 1, 1)
