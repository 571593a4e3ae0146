"""NumPy's preprocessing against torch's and torchvision's, on the cases of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fpn_engine.light.preprocessing import preprocess
from fpn_engine.resizing import padded_size, resized_size
from fpn_engine.spec import ModelSpec, numbered_categories
from tests.engine.conftest import Pixels
from tests.kernels.test_preprocess import by_hand
from tests.parity.subject import preprocess_together

SPEC = ModelSpec(categories=numbered_categories(1))
ROUNDING = 2e-6  # of products and sums; values are from -2.2 to 2.7
# A position of up to the image's side is rounded too, by other steps in PyTorch with one thread than with two; noise
# changes by all that it can from one pixel to the next.
ROUNDING_OF_POSITION = (2.7 + 2.2) * 2**-24


def make_noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("rule", [(800, 1333), (64, 100)], ids=str)
@pytest.mark.parametrize(
    "shape", [(480, 640), (333, 500), (50, 99), (37, 200), (1, 1), (3, 2), (1, 40), (40, 1), (1200, 1601)], ids=str
)
def test_equals_torch_and_torchvision(shape: tuple[int, int], rule: tuple[int, int]) -> None:
    image = make_noise(*shape)
    size = resized_size(*shape, *rule)
    batch = preprocess([image], [size], padded_size(size), SPEC)
    transform = GeneralizedRCNNTransform(*rule, list(SPEC.image_mean), list(SPEC.image_std))
    theirs, _ = transform([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    spec = ModelSpec(categories=SPEC.categories, min_size=rule[0], max_size=rule[1])
    ours, _ = preprocess_together([image], spec)
    for expected in (theirs.tensors, ours):
        tolerance = ROUNDING + ROUNDING_OF_POSITION * max(shape)
        np.testing.assert_allclose(batch, expected.numpy(), rtol=0, atol=tolerance)
    assert batch.dtype == np.float32


@pytest.mark.parametrize("resized", [(9, 7), (20, 31), (4, 5), (1, 1), (9, 30)], ids=str)
def test_equals_arithmetic_by_hand(resized: tuple[int, int]) -> None:
    image = make_noise(9, 7)
    batch = preprocess([image], [resized], (32, 32), SPEC)
    h, w = resized
    np.testing.assert_allclose(batch[0, :, :h, :w], by_hand(torch.from_numpy(image), h, w), rtol=0, atol=2e-5)
    assert not batch[0, :, h:].any()
    assert not batch[0, :, :, w:].any()


def test_same_size_only_normalises() -> None:
    image = make_noise(5, 6)
    mean, std = (np.array(values, dtype=np.float32) for values in (SPEC.image_mean, SPEC.image_std))
    expected = (image.astype(np.float32) / np.float32(255) - mean) / std
    np.testing.assert_array_equal(preprocess([image], [(5, 6)], (5, 6), SPEC)[0], expected.transpose(2, 0, 1))


def test_bgr_reverses_pixels_but_not_the_mean() -> None:
    image = make_noise(5, 6)
    bgr = ModelSpec(categories=SPEC.categories, channel_order="bgr")
    reversed_ = preprocess([np.ascontiguousarray(image[:, :, ::-1])], [(8, 9)], (32, 32), SPEC)
    np.testing.assert_array_equal(preprocess([image], [(8, 9)], (32, 32), bgr), reversed_)


def test_batch_equals_alone() -> None:
    images = [make_noise(h, w, seed) for seed, (h, w) in enumerate([(20, 30), (1, 1), (64, 9)])]
    sizes = [(42, 63), (64, 64), (64, 9)]
    together = preprocess(images, sizes, (64, 96), SPEC)
    for row, (image, size) in enumerate(zip(images, sizes, strict=True)):
        np.testing.assert_array_equal(together[row], preprocess([image], [size], (64, 96), SPEC)[0])
