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
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks.provenance import describe_run
from benchmarks.random_detector import make_random_detector
from fpn_engine.engine import Engine

SIZE = (800, 1216)
ROUNDS = 7
TARGET = 0.65  # of torchvision eager's time


@pytest.fixture(scope="module")
def contestants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, torch.nn.Module]:
    """Our engine and torchvision's model with the same weights."""
    import onnx

    from fpn_export.build import build_plan
    from fpn_export.onnx_export import export_onnx

    model = make_random_detector("resnet50")
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=torch.nn.BatchNorm2d)
    theirs = TorchvisionFasterRCNN(backbone, num_classes=model.spec.num_classes).eval()
    theirs.load_state_dict(model.state_dict())
    folder = tmp_path_factory.mktemp("bench")
    os.environ["FPN_ENGINE_CACHE"] = str(folder)
    onnx.save(export_onnx(model, model.spec), str(folder / "model.onnx"))
    return Engine.load(build_plan(folder / "model.onnx", folder / "model.plan").path), theirs


def make_images(count: int) -> list[NDArray[np.uint8]]:
    """Fresh random textures: noise at several scales, never zeros."""
    rng = np.random.default_rng(0)
    return [_texture(rng) for _ in range(count)]


def _texture(rng: np.random.Generator) -> NDArray[np.uint8]:
    total = np.zeros((*SIZE, 3))
    for cell in (1, 16, 100):
        rows, columns = -(-SIZE[0] // cell), -(-SIZE[1] // cell)
        noise = rng.integers(0, 256, (rows, columns, 3))
        total += noise.repeat(cell, axis=0).repeat(cell, axis=1)[: SIZE[0], : SIZE[1]]
    return (total / 3).astype(np.uint8)


def run_torchvision(model: torch.nn.Module, image: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return model([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]


def test_engine_against_torchvision(
    benchmark: BenchmarkFixture, contestants: tuple[Engine, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    engine, theirs = contestants
    images = make_images(ROUNDS + 1)
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
    """Largest differences between twins, scores aside that lie within 1e-3 of the cut."""
    ours, reference = engine(image)[0], run_torchvision(theirs, image)
    assert len(ours) >= 50, "too few detections to compare"
    boxes, scores, labels = (reference[key].numpy() for key in ("boxes", "scores", "labels"))
    worst_box = worst_score = 0.0
    cut = max(ours.scores.min(), scores.min()) + 1e-3
    for box, score, label in zip(ours.boxes, ours.scores, ours.labels, strict=True):
        if score < cut:
            continue
        same = labels == label
        distance = np.abs(boxes[same] - box).max(axis=1)
        assert distance.size
        twin = int(distance.argmin())
        worst_box = max(worst_box, float(distance[twin]))
        worst_score = max(worst_score, float(abs(scores[same][twin] - score)))
    assert worst_box <= 0.1
    assert worst_score <= 1e-3
    return {"largest_corner_difference_px": worst_box, "largest_score_difference": worst_score}


def clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def summarise(seconds: list[float]) -> dict[str, float]:
    p20, median, p80 = (round(float(value), 3) for value in np.percentile(seconds, [20, 50, 80]))
    return {"median": median, "p20": p20, "p80": p80}
