"""Preprocessing on the device against the reference, F.interpolate included, and against torchvision's transform."""

from importlib import import_module
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fpn_kernels import pack_images
from fpn_kernels.preprocess import preprocess_reference
from fpn_kernels.triton.preprocess import launch_preprocess
from tests.kernels.test_preprocess import MEAN, STD, by_hand, make_image
from tests.kernels.triton.capture import assert_capturable
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_memory")
MODULE = import_module("fpn_kernels.triton.preprocess")
ROUNDING = 1e-6  # four eps of the largest value, 2.64: a bilinear sum of normalised bytes or a normalised sum of bytes


def give(images, image_sizes, padded_size, *, mean=MEAN, std=STD, reverse=False, planar=False, dtype=torch.float32):
    """Arguments of launcher and reference."""
    packed = pack_images([image.permute(2, 0, 1) if planar else image for image in images], planar=planar)
    return *packed, torch.tensor(image_sizes), padded_size, mean, std, reverse, planar, dtype


def launch(*given):
    batch = launch_preprocess(*(part.to(DEVICE) for part in given[:4]), *given[4:])
    assert batch.is_contiguous(memory_format=torch.channels_last)
    return batch.cpu()


def assert_equals_reference(*given, atol=ROUNDING):
    torch.testing.assert_close(launch(*given), preprocess_reference(*given).contiguous(), rtol=0, atol=atol)


@pytest.mark.parametrize(("planar", "reverse"), [(False, False), (True, True)])
def test_images_of_any_size_in_one_batch(planar, reverse):
    images = [make_image(h, w, seed) for seed, (h, w) in enumerate([(20, 30), (1, 1), (5, 9), (3, 50)])]
    sizes = [(4, 6), (5, 32), (5, 9), (2, 35)]
    with mock.patch.object(MODULE, "BLOCK", 32):
        assert_equals_reference(*give(images, sizes, (5, 40), planar=planar, reverse=reverse))


@pytest.mark.parametrize("rule", [(12, 40), (6, 90)], ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (17, 25), (37, 200), (1, 1), (3, 2), (1, 40)], ids=str)
def test_equals_torchvision(shape, rule):
    image = make_image(*shape)
    transform = GeneralizedRCNNTransform(*rule, list(MEAN), list(STD), size_divisible=8)
    expected, _ = transform([image.permute(2, 0, 1).float() / 255])
    batch = launch(*give([image], expected.image_sizes, tuple(expected.tensors.shape[-2:])))
    torch.testing.assert_close(batch, expected.tensors, rtol=0, atol=ROUNDING, check_stride=False)


SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None, max_examples=6)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=2), st.booleans())
def test_any_sizes_equal_arithmetic_by_hand(sizes, planar):
    images = [make_image(*size, seed) for seed, (size, _) in enumerate(sizes)]
    resized = [size for _, size in sizes]
    batch = launch(*give(images, resized, (9, 10), planar=planar))
    for found, image, (h, w) in zip(batch, images, resized, strict=True):
        # A source position of up to 9 is off by 9 * 2^-24, a value then by that part of two neighbours' difference.
        torch.testing.assert_close(found[:, :h, :w].double(), by_hand(image, h, w), rtol=0, atol=1e-5)
        assert found[:, h:].count_nonzero() + found[:, :, w:].count_nonzero() == 0


def test_long_rows_have_the_reference_s_source_positions():
    """At 2000 pixels a position that is rounded twice is off by 1e-4 pixels, and the value by more than 1e-4."""
    assert_equals_reference(*give([make_image(2, 2000)], [(2, 1733)], (2, 1760)))


@pytest.mark.parametrize("planar", [False, True])
def test_same_size_is_exact(planar):
    images = [make_image(5, 6)]
    assert_equals_reference(*give(images, [(5, 6)], (8, 8), planar=planar), atol=0)


def test_other_means_and_deviations():
    """Pixels in 0..255, as Detectron2's networks have them."""
    mean, std = tuple(m / 255 for m in (103.53, 116.28, 123.675)), (1 / 255,) * 3
    given = give([make_image(7, 9)], [(8, 14)], (8, 16), mean=mean, std=std, reverse=True)
    assert_equals_reference(*given, atol=60 * ROUNDING)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)], ids=str)
def test_low_precision_only_rounds_the_result(dtype, step):
    given = give([make_image(10, 12)], [(7, 19)], (8, 24))
    batch = launch(*given[:-1], dtype)
    assert batch.dtype == dtype
    torch.testing.assert_close(
        batch.float(), preprocess_reference(*given), rtol=step, atol=ROUNDING, check_stride=False
    )


def test_batch_equals_alone():
    images, sizes = [make_image(9, 14, 1), make_image(14, 9, 2)], [(4, 6), (6, 4)]
    together = launch(*give(images, sizes, (6, 8)))
    for i, image in enumerate(images):
        assert torch.equal(together[i], launch(*give([image], [sizes[i]], (6, 8)))[0])


def test_batch_of_none():
    none = torch.empty(0, 2, dtype=torch.int64)
    batch = launch(*pack_images([]), none, (8, 16), MEAN, STD, False, False, torch.float16)
    assert (batch.shape, batch.dtype) == ((0, 3, 8, 16), torch.float16)


REAL = [((480, 640), (800, 1066)), ((333, 500), (800, 1201)), ((1200, 1600), (800, 1066)), ((427, 640), (800, 1199))]


@pytest.mark.gpu
@pytest.mark.parametrize("planar", [False, True])
def test_real_images(planar):
    images = [make_image(*shape, seed) for seed, (shape, _) in enumerate(REAL)]
    assert_equals_reference(*give(images, [resized for _, resized in REAL], (800, 1216), planar=planar))


@pytest.mark.gpu
def test_capturable():
    """One graph for images of any size: the buffer is as large as it may be, the sizes lie in it."""
    given = []
    for shape, resized in REAL[:2]:
        pixels, offsets, *rest = give([make_image(*shape)], [resized], (800, 1216), dtype=torch.float16)
        given.append((torch.nn.functional.pad(pixels, (0, 480 * 640 * 3 - len(pixels))), offsets, *rest))
    assert_capturable(launch_preprocess, *given)
