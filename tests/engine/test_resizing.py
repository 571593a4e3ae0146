"""The size rule against torchvision's, over thousands of shapes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import _resize_image_and_masks

from fpn_engine.resizing import padded_size, resized_size

RULES = [(800, 1333), (240, 320), (600, 1000)]


def torchvisions_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """What torchvision's transform makes of an image of that size."""
    resized, _ = _resize_image_and_masks(torch.zeros(1, 1, 1).expand(1, height, width), min_size, max_size)
    return resized.shape[1], resized.shape[2]


@pytest.fixture
def without_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resizing makes an unfilled image: torch and torchvision still decide its size, thousands of times a second."""

    def unfilled(image: torch.Tensor, output_size: list[int], *_: object) -> torch.Tensor:
        return image.new_empty(*image.shape[:2], *output_size, device="meta")

    monkeypatch.setattr(torch._C._nn, "upsample_bilinear2d", unfilled)


def float32_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """The rule of torchvision's traced path, for showing that the shapes below tell the two apart."""
    scale = min(
        np.float32(min_size) / np.float32(min(height, width)), np.float32(max_size) / np.float32(max(height, width))
    )
    return math.floor(np.float32(height) * scale), math.floor(np.float32(width) * scale)


def shapes() -> list[tuple[int, int]]:
    """Heights to 1400 with a width drawn for each, camera sizes, sides that the rules meet exactly; both ways round."""
    generator = np.random.default_rng(0)
    drawn = [(int(h), int(w)) for h, w in zip(range(40, 1400), generator.integers(40, 4000, 1360), strict=True)]
    common = [(480, 640), (427, 640), (1080, 1920), (3024, 4032), (333, 500), (500, 375), (1000, 1000), (600, 799)]
    exact = [(h, w) for h in (100, 111, 160, 333, 400, 512, 799, 800, 801) for w in (100, 177, 533, 800, 1333, 1334)]
    return [shape for h, w in drawn + common + exact for shape in ((h, w), (w, h))]


@pytest.mark.parametrize("shape", [(333, 500), (801, 533), (67, 200)])
def test_the_shortcut_changes_no_size(shape: tuple[int, int], request: pytest.FixtureRequest) -> None:
    real = torchvisions_size(*shape, 240, 320)
    request.getfixturevalue("without_pixels")
    assert torchvisions_size(*shape, 240, 320) == real


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("without_pixels")
def test_equals_torchvision(rule: tuple[int, int]) -> None:
    checked = shapes()
    assert len(checked) > 2500
    wrong = [shape for shape in checked if resized_size(*shape, *rule) != torchvisions_size(*shape, *rule)]
    assert wrong == []


def test_the_shapes_tell_float32_from_float64() -> None:
    differing = [s for s in shapes() for rule in RULES if resized_size(*s, *rule) != float32_size(*s, *rule)]
    assert len(differing) > 20


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1), (800, 800)),
        ((1, 4000), (1, 1333)),
        ((4000, 1), (1333, 1)),
        ((1, 1333), (1, 1333)),
        ((1, 1334), (1, 1333)),
        ((8000, 1), (1333, 1)),
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((1, 2), (666, 1333)),
    ],
)
def test_by_hand(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    """The long side reaches its limit, the short one at most its own, and neither falls below one pixel."""
    assert resized_size(*shape, 800, 1333) == expected


def test_where_torchvision_has_no_pixel_left() -> None:
    with pytest.raises(RuntimeError):
        torchvisions_size(1, 4000, 800, 1333)


@pytest.mark.parametrize("side", [*range(1, 130), 800, 1333])
def test_padded_to_the_next_multiple(side: int) -> None:
    height, width = padded_size((side, 1))
    assert width == 32
    assert height % 32 == 0
    assert side <= height < side + 32


def test_the_number_of_padded_sizes() -> None:
    """Under 800/1333 there are 83, of which 35 for aspect ratios up to 5:3: few enough to prepare each."""
    everything, everyday = set(), set()
    for short, long in itertools.product((777, 1000), [*range(777, 1700), *range(1700, 40000, 7)]):
        for shape in ((short, long), (long, short)):
            size = padded_size(resized_size(*shape, 800, 1333))
            everything.add(size)
            if max(shape) <= 1.67 * min(shape):
                everyday.add(size)
    assert (len(everything), len(everyday)) == (83, 35)
