"""Ranges and scales against numbers worked out by hand and against exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fpn_export.quantization.eight_bits import find_scale, to_steps
from fpn_export.quantization.pairs import quantize_weight
from fpn_export.quantization.ranges import BINS, RANGES, Histogram


def histogram_of(*values: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for each in values:
        histogram.add(each)
    return histogram


def test_a_weight_by_hand() -> None:
    """Channel 0 reaches 2.54, so a step is 0.02; channel 1 reaches 127, so a step is 1; channel 2 is nothing."""
    weight = np.array([[2.54, -0.05, 0.011, -0.01], [-127.0, 0.5, 1.5, 2.5], [0.0, 0.0, 0.0, 0.0]], np.float32)
    steps, scale = quantize_weight(weight, "int8")
    np.testing.assert_allclose(scale[:2], [0.02, 1.0], rtol=1e-6)
    assert scale[2] > 0
    assert steps.dtype == np.int8
    assert steps[0, 0] == 127
    assert steps[0, 2] == 1  # 0.55 steps
    assert steps[1].tolist() == [-127, 0, 2, 2]  # half to even
    assert steps[2].tolist() == [0, 0, 0, 0]


def test_a_weight_of_a_convolution_has_a_scale_for_each_output_channel() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 3, 2, 2), np.float32)
    steps, scale = quantize_weight(weight, "int8")
    assert scale.shape == (5,)
    error = np.abs(steps * scale[:, None, None, None] - weight).reshape(5, -1).max(axis=1)
    assert (error <= scale / 2 * 1.001).all()


def test_fp8_keeps_its_largest_number_and_three_bits() -> None:
    values = np.array([7.0, -7.0, 3.5, 1.0, 0.01], np.float32)
    scale = find_scale(7.0, "fp8")
    made = to_steps(values, scale, "fp8").astype(np.float32) * scale
    np.testing.assert_allclose(made, values, rtol=1 / 16 + 1e-6)
    assert made[0] == pytest.approx(7.0)


def test_a_histogram_grows_without_losing_a_number() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1000, generator=generator) * scale for scale in (0.1, 5.0, 0.0, 300.0, 1.0)]
    histogram = histogram_of(*values)
    magnitudes = torch.cat(values).abs()
    assert histogram.largest == pytest.approx(float(magnitudes.max()))
    assert histogram.counts.sum() == len(magnitudes)
    assert BINS / 2 <= len(histogram.counts) <= BINS
    for index in (0, 10, len(histogram.counts) // 2):
        edge = (index + 1) * histogram.width
        # A number at an edge may fall on either side of it.
        assert histogram.counts[: index + 1].sum() == pytest.approx(float((magnitudes < edge).sum()), abs=2)


def test_zeros_alone_have_a_range() -> None:
    for name, find in RANGES.items():
        assert find(histogram_of(torch.zeros(10)), "int8") == 0.0, name
    assert find_scale(0.0, "int8") > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        Histogram().add(torch.tensor([1.0, bad]))


def test_max_and_percentile() -> None:
    values = torch.cat([torch.linspace(0, 1, 99_999), torch.tensor([50.0])])
    histogram = histogram_of(values)
    assert RANGES["max"](histogram, "int8") == 50.0
    assert RANGES["percentile"](histogram, "int8") == pytest.approx(1.0, abs=2 * histogram.width)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_mse_is_the_least_of_all_ranges(precision: str) -> None:
    values = torch.from_numpy(np.random.default_rng(0).laplace(size=50_000).astype(np.float32))
    histogram = histogram_of(values)
    array = values.numpy().astype(np.float64)

    def error(limit: float) -> float:
        scale = find_scale(limit, precision)
        return float(((to_steps(array, scale, precision).astype(np.float64) * scale - array) ** 2).sum())

    found = RANGES["mse"](histogram, precision)
    best = min(error(float(limit)) for limit in np.linspace(0.05, 1, 60) * histogram.largest)
    assert error(found) <= 1.02 * best
    if precision == "int8":
        assert found < 0.95 * histogram.largest  # the tail of a Laplace distribution is cut


def test_entropy_cuts_a_far_outlier_and_no_even_distribution() -> None:
    even = torch.linspace(0.0, 1.0, 100_000)
    assert RANGES["entropy"](histogram_of(even), "int8") > 0.9
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    cut = RANGES["entropy"](histogram_of(torch.cat([normal, torch.tensor([40.0])])), "int8")
    assert 2.5 < cut < 10.0


def test_entropy_is_not_of_fp8() -> None:
    with pytest.raises(ValueError, match="equal steps"):
        RANGES["entropy"](histogram_of(torch.rand(10)), "fp8")
