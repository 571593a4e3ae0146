"""The plan on ONNX Runtime against torchvision eager: same weights, same inputs, fp32, one image of 800x1216 at a time.

    pytest benchmarks/bench_engine.py

The two take turns within one run, so that the ratio holds on a machine whose speed drifts. Results are checked to be
the same before they are timed. Set FPN_ENGINE_BENCH_JSON to a path to keep the figures with their provenance.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.provenance import describe_run
from fpn_engine.engine import Engine
from fpn_engine.spec import ModelSpec, numbered_categories
from tests.parity.random_detector import make_picture
from tests.parity.subject import random_subject
from tests.parity.torchvision_oracle import Comparison, Found, Oracle

SIZE = (800, 1216)
ROUNDS = 7
TARGET = 0.65  # of torchvision eager's time


@pytest.fixture(scope="module")
def contestants() -> tuple[Engine, torch.nn.Module]:
    """Our engine and torchvision's model with the same random weights, as large as the COCO model."""
    # Calibrated on small pictures, run at full size.
    small = ModelSpec(categories=numbered_categories(90), min_size=160, max_size=256)
    subject = random_subject("resnet50", small, representation_size=1024)
    full_size = {"min_size": 800, "max_size": 1333}
    return subject.engine(**full_size), subject.oracle(**full_size).model


def run_torchvision(model: torch.nn.Module, image: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return model([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]


def test_engine_against_torchvision(
    benchmark: BenchmarkFixture, contestants: tuple[Engine, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    engine, theirs = contestants
    images = [make_picture(*SIZE, seed) for seed in range(ROUNDS + 1)]
    agreement = compare(engine, theirs, images[0])

    waiting = iter(images[1:])
    theirs_seconds: list[float] = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        image = next(waiting)
        theirs_seconds.append(clock(lambda: run_torchvision(theirs, image)))
        return (image,), {}

    benchmark.pedantic(engine, setup=setup, rounds=ROUNDS, iterations=1)
    ours_seconds: list[float] = benchmark.stats.stats.data
    ratio = statistics.median(o / t for o, t in zip(ours_seconds, theirs_seconds, strict=True))
    row = {
        "what": "R50-FPN, 800x1216, batch 1, fp32, 91 classes, random weights, uint8 array to detections",
        "engine_seconds": summarise(ours_seconds),
        "torchvision_eager_seconds": summarise(theirs_seconds),
        "median_ratio": round(ratio, 3),
        "rounds": ROUNDS,
        "agreement": agreement,
        **describe_run("pytest benchmarks/bench_engine.py"),
    }
    benchmark.extra_info.update(row)
    with capsys.disabled():
        print(
            f"\nfpn-engine {row['engine_seconds']}\ntorchvision {row['torchvision_eager_seconds']}\nratio {ratio:.3f}"
        )
    if path := os.environ.get("FPN_ENGINE_BENCH_JSON"):
        Path(path).write_text(json.dumps([row], indent=1) + "\n")
    assert ratio <= TARGET, f"{ratio:.3f} of torchvision's time; the target is {TARGET}"


def compare(engine: Engine, theirs: torch.nn.Module, image: NDArray[np.uint8]) -> dict[str, float]:
    """Every detection has its twin; the largest differences between them."""
    oracle, comparison = Oracle(theirs), Comparison()
    comparison.assert_twins(Found.of(engine(image)[0]), oracle.detect(image), oracle.wavering(image))
    assert comparison.found >= 50, "too few detections to compare"
    return {
        "detections": comparison.found,
        "without_twin_by_ties": comparison.tied,
        "largest_score_difference": comparison.score,
        "largest_corner_difference_px": comparison.corner,
    }


def clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summarise(seconds: list[float]) -> dict[str, float]:
    p20, median, p80 = (round(float(value), 3) for value in np.percentile(seconds, [20, 50, 80]))
    return {"median": median, "p20": p20, "p80": p80}
