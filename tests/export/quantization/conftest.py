"""A small detector, its quantised forms, and images for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto
from PIL import Image

from fpn_engine.sources import list_images
from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.detector import FasterRCNN
from fpn_export.onnx_export import export_onnx
from fpn_export.quantization.layers import Network
from fpn_export.quantization.pairs import insert_pairs
from fpn_export.quantization.quantize import QuantizeOptions, quantize_model
from fpn_export.quantization.report import Report
from tests.threads import one_thread

__all__ = ["one_thread"]

SPEC = ModelSpec(
    categories=numbered_categories(3),
    arch="resnet18",
    body_width=16,
    fpn_channels=16,
    min_size=64,
    max_size=96,
    anchor_sizes=((8.0,), (16.0,), (32.0,), (48.0,), (64.0,)),
    rpn_pre_nms_top_n_test=60,
    rpn_post_nms_top_n_test=40,
    box_detections_per_img=20,
)
QUICK = QuantizeOptions(calibrate=3, score=2, sensitivity=1, tolerance=None)
LOGIT_SCALE = 30.0  # random weights say nothing; this much louder, scores spread


@pytest.fixture(scope="session")
def model() -> ModelProto:
    """Not to be changed."""
    torch.manual_seed(0)
    detector = FasterRCNN(SPEC, representation_size=32).eval()
    with torch.no_grad():
        detector.state_dict()["roi_heads.box_predictor.cls_score.weight"].mul_(LOGIT_SCALE)
    return export_onnx(detector, SPEC)


@pytest.fixture(scope="session")
def layers(model: ModelProto) -> list[str]:
    return [layer.name for layer in Network(model).layers]


@pytest.fixture(scope="session")
def pairs(model: ModelProto, layers: list[str]) -> Callable[[str], ModelProto]:
    """All layers quantised with one range for all values: what graphs look like, no calibration."""

    def make(precision: str) -> ModelProto:
        network = Network(model)
        ranges = dict.fromkeys(network.points(network.layers), 4.0)
        return insert_pairs(model, layers, ranges, precision)

    return make


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for seed in range(6):
        cells = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(cells.repeat(8, axis=0).repeat(8, axis=1)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="session")
def quantized(model: ModelProto, photographs: Path) -> tuple[ModelProto, Report]:
    return quantize_model(model, SPEC, list(list_images([photographs])), QUICK)
