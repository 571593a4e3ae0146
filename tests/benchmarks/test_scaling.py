"""Fitted exponents against hand-made points, and memory against tensors of known size."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from benchmarks.bench_scaling import AXES, Axis, Point, measure
from benchmarks.scaling import fit_power, measure_peak
from benchmarks.suite import Effort
from fpn_engine.ruler import Turn

XS = (1_000, 3_000, 10_000, 30_000, 100_000)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_points_on_a_power_law(exponent: float) -> None:
    fit = fit_power(XS, [3e-4 * x**exponent for x in XS])
    assert fit.exponent == pytest.approx(exponent)
    assert fit.low == pytest.approx(fit.high) == pytest.approx(exponent)
    assert fit.scale == pytest.approx(3e-4)


def test_confidence_holds_what_it_says() -> None:
    """In 95 of 100 draws the true exponent lies within."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        fit = fit_power(
            XS, [x**1.2 * factor for x, factor in zip(XS, np.exp(generator.normal(0, 0.1, 5)), strict=True)]
        )
        inside += fit.low <= 1.2 <= fit.high
    assert 0.93 < inside / 2000 < 0.97


def test_batches_that_the_device_holds() -> None:
    """64 on a GPU, fewer on a CPU; other axes are the same on both."""
    batches, boxes = (next(axis for axis in AXES if axis.name.endswith(end)) for end in ("batch", "boxes"))
    on_gpu, on_cpu = OnDevice(kind="cuda"), OnDevice(kind="cpu")
    assert batches.choose(on_gpu) == [1, 2, 4, 8, 16, 32, 64]
    assert batches.choose(on_cpu) == [1, 2, 4, 8]
    assert batches.choose(OnDevice(kind="cuda", largest_batch=16)) == [1, 2, 4, 8, 16]
    assert batches.choose(OnDevice(kind="cuda", quick=True)) == list(batches.quick_sizes)
    assert boxes.choose(on_gpu) == boxes.choose(on_cpu) == list(boxes.sizes)


@dataclass(frozen=True, kw_only=True)
class OnDevice(Effort):
    kind: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind)


def test_memory_that_is_there_before_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured detector's call takes none: what its set-up told is what counts."""

    def make(effort: Effort, size: int) -> Point:
        return Point(size, Turn("wall", lambda number: None, lambda: time.sleep(1e-4 * size)), 1000 * size)

    monkeypatch.setattr("benchmarks.bench_scaling.measure_peak", None)
    axis = Axis(name="a detector against batch", sizes=(1, 2, 4), quick_sizes=(1, 2, 4), make=make)
    (measured,) = measure(Effort(quick=True), axis)
    assert [point["peak_memory_bytes"] for point in measured.row["points"]] == [1000, 2000, 4000]
    assert measured.row["memory"]["exponent"] == pytest.approx(1.0)


@pytest.mark.parametrize("xs", [(1.0, 2.0), (3.0, 3.0, 3.0)])
def test_too_few_points(xs: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="three points"):
        fit_power(xs, xs)


@pytest.mark.parametrize("megabytes", [8, 64])
def test_peak_memory(megabytes: int) -> None:
    """A tensor and one as large beside it, of which one is given back."""
    size = megabytes << 20
    peak = measure_peak(lambda: torch.ones(size, dtype=torch.uint8) + 1, torch.device("cpu"))
    if peak is None:
        pytest.skip("only Linux tells a process's largest size")
    assert 1.8 * size < peak < 2.5 * size + (8 << 20)
