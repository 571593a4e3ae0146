"""Preprocessing against torchvision's GeneralizedRCNNTransform and against arithmetic pixel by pixel."""

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fpn_kernels import PackedImages, pack_images, preprocess
from tests.kernels.boxes import seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_image(h, w, seed=0):
    return torch.randint(256, (h, w, 3), dtype=torch.uint8, generator=seeded(seed))


def run(images, image_sizes, padded_size, **options):
    return preprocess(*pack_images(images), torch.tensor(image_sizes), padded_size, MEAN, STD, **options)


# (height, width), and the rule: (800, 1333) is the paper's, the small one keeps the tests quick.
@pytest.mark.parametrize("rule", [(800, 1333), (64, 100)], ids=str)
@pytest.mark.parametrize("shape", [(480, 640), (333, 500), (50, 99), (37, 200), (1, 1), (3, 2), (1, 40)], ids=str)
def test_equals_torchvision(shape, rule):
    image = make_image(*shape)
    expected, _ = GeneralizedRCNNTransform(*rule, list(MEAN), list(STD))([image.permute(2, 0, 1).float() / 255])
    batch = run([image], expected.image_sizes, tuple(expected.tensors.shape[-2:]))
    assert torch.equal(batch, expected.tensors)


def by_hand(image, h, w):
    """Bilinear resizing in float64, one pixel at a time: source = (i + 0.5) * in / out - 0.5, clamped."""
    pixels = (image.numpy() / 255.0 - np.array(MEAN)) / np.array(STD)

    def taps(i, size, out):
        source = min(max((i + 0.5) * size / out - 0.5, 0), size - 1)
        low = int(source)
        return [(low, 1 - source + low), (min(low + 1, size - 1), source - low)]

    result = np.zeros((3, h, w))
    for y, x in np.ndindex(h, w):
        for sy, wy in taps(y, image.shape[0], h):
            for sx, wx in taps(x, image.shape[1], w):
                result[:, y, x] += wy * wx * pixels[sy, sx]
    return torch.from_numpy(result)


@pytest.mark.parametrize("resized", [(9, 7), (20, 31), (4, 5), (1, 1), (9, 30)], ids=str)
def test_equals_arithmetic_by_hand(resized):
    image = make_image(9, 7)
    batch = run([image], [resized], (32, 32))
    h, w = resized
    # Values reach 2.7; weights and products round in float32, and a source position of up to 9 by 9 * 2^-24.
    torch.testing.assert_close(batch[0, :, :h, :w].double(), by_hand(image, h, w), rtol=0, atol=2e-5)
    assert batch[0, :, h:].count_nonzero() == 0
    assert batch[0, :, :, w:].count_nonzero() == 0


def test_same_size_only_normalises():
    image = make_image(5, 6)
    expected = (image.permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(run([image], [(5, 6)], (5, 6))[0], expected)


def test_bgr_reverses_pixels_but_not_the_mean():
    image = make_image(5, 6)
    assert torch.equal(
        run([image], [(8, 9)], (32, 32), reverse_channels=True), run([image.flip(2)], [(8, 9)], (32, 32))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_only_rounds_the_result(dtype):
    image = make_image(30, 40)
    batch = run([image], [(48, 64)], (64, 64), dtype=dtype)
    assert torch.equal(batch, run([image], [(48, 64)], (64, 64)).to(dtype))


def test_batch_equals_alone():
    images = [make_image(h, w, seed) for seed, (h, w) in enumerate([(20, 30), (1, 1), (64, 9)])]
    sizes = [(42, 63), (64, 64), (64, 9)]
    together = run(images, sizes, (64, 96))
    for i, image in enumerate(images):
        assert torch.equal(together[i], run([image], [sizes[i]], (64, 96))[0])


def test_offsets_are_obeyed():
    images = [make_image(20, 30, 1), make_image(7, 9, 2)]
    packed = pack_images(images)
    swapped = PackedImages(packed.pixels, packed.offsets.flip(0), packed.sizes.flip(0))
    sizes = torch.tensor([[32, 41], [40, 60]])
    batch = preprocess(*swapped, sizes, (64, 64), MEAN, STD)
    assert torch.equal(batch, run(images[::-1], sizes.tolist(), (64, 64)))


def test_pack_images_lays_them_end_to_end():
    images = [make_image(2, 3, 1), make_image(4, 1, 2).transpose(0, 1), make_image(1, 1, 3)]  # one not contiguous
    pixels, offsets, sizes = pack_images(images)
    assert offsets.tolist() == [0, 18, 30]
    assert sizes.tolist() == [[2, 3], [1, 4], [1, 1]]
    assert (offsets.dtype, sizes.dtype) == (torch.int64, torch.int64)
    assert torch.equal(pixels, torch.cat([image.flatten() for image in images]))


def test_batch_of_none():
    packed = pack_images([])
    assert [tuple(part.shape) for part in packed] == [(0,), (0,), (0, 2)]
    batch = preprocess(*packed, torch.empty(0, 2, dtype=torch.int64), (32, 64), MEAN, STD, dtype=torch.float16)
    assert (batch.shape, batch.dtype) == ((0, 3, 32, 64), torch.float16)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(4, 4, 3), "image must be uint8"),
        (torch.zeros(4, 4, dtype=torch.uint8), "image must have shape"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "image must have shape"),
        (torch.zeros(0, 0, 3, dtype=torch.uint8), "at least one pixel"),
        (torch.zeros(0, 5, 3, dtype=torch.uint8), "at least one pixel"),
    ],
)
def test_pack_images_rejects(image, message):
    with pytest.raises(ValueError, match=message):
        pack_images([make_image(2, 2), image])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(12)}, "pixels must be uint8"),
        ({"pixels": torch.zeros(2, 6, dtype=torch.uint8)}, "pixels must have shape"),
        ({"offsets": torch.zeros(1)}, "offsets must be int64"),
        ({"sizes": torch.ones(2, 2, dtype=torch.int64)}, "sizes must have shape"),
        ({"sizes": torch.ones(1, 2, dtype=torch.int32)}, "sizes must be int64"),
        ({"image_sizes": torch.ones(1, 3, dtype=torch.int64)}, "image_sizes must have shape"),
        ({"image_sizes": torch.ones(1, 2)}, "image_sizes must be int64"),
        ({"image_sizes": torch.ones(1, 2, dtype=torch.int64, device="meta")}, "one device"),
        ({"mean": (0.5, 0.5)}, "three numbers"),
        ({"std": (0.5,)}, "three numbers"),
        ({"padded_size": (0, 32)}, "padded_size must be positive"),
        ({"dtype": torch.float64}, "dtype must be float32"),
    ],
    ids=str,
)
def test_rejects(change, message):
    pixels, offsets, sizes = pack_images([make_image(2, 2)])
    arguments = {
        "pixels": pixels,
        "offsets": offsets,
        "sizes": sizes,
        "image_sizes": torch.tensor([[4, 4]]),
        "padded_size": (32, 32),
        "mean": MEAN,
        "std": STD,
    } | change
    with pytest.raises(ValueError, match=message):
        preprocess(**arguments)
