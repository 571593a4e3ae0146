"""Which images an update sees, how they are changed on the way, and that this depends on the place alone."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from fpn_engine.resizing import resized_size
from fpn_export.training.augmentation import augment
from fpn_export.training.batches import BatchOrder, load_batches
from fpn_export.training.examples import Example
from fpn_export.training.randomness import AUGMENTATION, random_state
from fpn_export.training.recipe import Recipe
from tests.export.training.squares import Squares, tiny_spec

WIDE, UPRIGHT = (60, 80), (80, 60)


def images_of(order: BatchOrder) -> list[list[int]]:
    return [[place.image for place in batch] for batch in order]


def test_every_image_is_seen_once_an_epoch() -> None:
    batches = images_of(BatchOrder([WIDE] * 12, Recipe(steps=6, batch_size=4)))
    for epoch in (batches[:3], batches[3:]):
        assert sorted(chain(*epoch)) == list(range(12))
    assert batches[:3] != batches[3:]


def test_a_batch_has_one_orientation() -> None:
    shapes = [WIDE, UPRIGHT, WIDE, WIDE, UPRIGHT]
    batches = images_of(BatchOrder(shapes, Recipe(steps=50, batch_size=3)))
    assert len(batches) == 50
    assert all(len({shapes[image] for image in batch}) == 1 for batch in batches)
    seen = Counter(chain(*batches))
    assert max(seen.values()) - min(seen.values()) <= 2


def test_a_run_taken_up_sees_what_is_left_of_the_same_order() -> None:
    recipe = Recipe(steps=20, batch_size=2, seed=7)
    whole = list(BatchOrder([WIDE] * 9, recipe))
    assert list(BatchOrder([WIDE] * 9, recipe, first_step=13)) == whole[13:]
    assert whole != list(BatchOrder([WIDE] * 9, Recipe(steps=20, batch_size=2, seed=8)))


def test_processes_share_each_batch() -> None:
    recipe = Recipe(steps=5, batch_size=4)
    whole = list(BatchOrder([WIDE] * 10, recipe))
    shares = [list(BatchOrder([WIDE] * 10, recipe, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    with pytest.raises(ValueError, match="does not divide"):
        BatchOrder([WIDE], Recipe(steps=1, batch_size=3), world_size=2)


def find_color(pixels: np.ndarray, color: tuple[int, int, int]) -> list[int]:
    y, x = np.nonzero((pixels == color).all(axis=-1))
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_a_flip_takes_boxes_and_proposals_along() -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[4:9, 2:12] = (255, 0, 0)
    box = np.array([[2, 4, 12, 9]], np.float32)
    example = Example(pixels, box, np.array([1]), box)
    flipped, factor = augment(example, Recipe(steps=1, flip=1.0), random_state(0, AUGMENTATION))
    assert flipped.boxes.tolist() == [find_color(flipped.pixels, (255, 0, 0))] == [[18, 4, 28, 9]]
    assert flipped.proposals is not None
    assert flipped.proposals.tolist() == flipped.boxes.tolist()
    assert factor == 1.0
    same, _ = augment(example, Recipe(steps=1, flip=0.0), random_state(0, AUGMENTATION))
    assert np.array_equal(same.pixels, pixels)


def test_scale_and_brightness_stay_in_their_range() -> None:
    example = Example(np.full((4, 4, 3), 100, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    recipe = Recipe(steps=1, scales=(0.5, 2.0), brightness=0.2)
    drawn = [augment(example, recipe, random_state(0, AUGMENTATION, i)) for i in range(300)]
    factors = [factor for _, factor in drawn]
    assert 0.5 <= min(factors) < 0.55
    assert 1.9 < max(factors) <= 2.0
    assert abs(float(np.median(factors)) - 1.0) < 0.15  # log-uniform
    values = [int(changed.pixels[0, 0, 0]) for changed, _ in drawn]
    assert 80 <= min(values) < 84
    assert 116 < max(values) <= 120


def test_batches_are_preprocessed_as_for_inference_and_boxes_scaled_with_them() -> None:
    squares, spec = Squares(3, 8), tiny_spec(min_size=64, max_size=64)
    batch = next(iter(load_batches(squares, spec, Recipe(steps=1, batch_size=4, flip=0.0))))
    places = next(iter(BatchOrder(squares.shapes, Recipe(steps=1, batch_size=4))))
    size = resized_size(96, 96, 64, 64)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.image_sizes.tolist() == [list(size)] * 4
    for place, objects in zip(places, batch.objects, strict=True):
        np.testing.assert_allclose(objects.boxes.numpy(), squares[place.image].boxes * 64 / 96, rtol=1e-6)
        assert objects.labels.tolist() == squares[place.image].labels.tolist()


def test_readers_in_other_processes_read_the_same() -> None:
    squares, recipe = Squares(3, 8), Recipe(steps=3, batch_size=2, scales=(0.8, 1.2), brightness=0.1)
    here, elsewhere = (list(load_batches(squares, tiny_spec(), recipe, workers=workers)) for workers in (0, 2))
    assert len(here) == len(elsewhere) == 3
    for a, b in zip(here, elsewhere, strict=True):
        assert torch.equal(a.images, b.images)
        assert all(torch.equal(x.boxes, y.boxes) for x, y in zip(a.objects, b.objects, strict=True))
