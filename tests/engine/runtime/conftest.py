"""A small detector in PyTorch, and the device that stands in for a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fpn_engine.batching import make_batches
from fpn_engine.buckets import Buckets
from fpn_engine.pipeline import Pipeline, Thresholds
from fpn_engine.runtime.runner import Group, Task
from fpn_engine.spec import ModelSpec
from fpn_export.detector import FpnDetector, make_detector
from fpn_kernels.registration import Op
from tests.engine.conftest import LOGIT_SCALE, SPEC, Pixels, make_picture

KINDS = {
    "faster_rcnn": SPEC,
    "fast_rcnn": dataclasses.replace(SPEC, model="fast_rcnn"),
    "rpn": dataclasses.replace(SPEC, model="rpn", categories=SPEC.categories[:1]),
}


def make_model(spec: ModelSpec) -> FpnDetector:
    torch.manual_seed(0)
    model = make_detector(spec, representation_size=32).eval()
    if model.has_box_head:
        with torch.no_grad():
            model.roi_heads["box_predictor"].cls_score.weight *= LOGIT_SCALE
    return model


@pytest.fixture(scope="session")
def model() -> FpnDetector:
    return make_model(SPEC)


def fixed(model: FpnDetector, **options: Any) -> Pipeline:
    """The pipeline as a GPU runs it."""
    head = model.head if model.has_box_head else None
    return Pipeline(model.spec, model.trunk, head, **({"fixed_shapes": True} | options))


def pretend_cuda(model: torch.nn.Module) -> None:
    """Within a FakeTensorMode: tensors that have a shape and say that they are on a GPU take the place of all."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@pytest.fixture
def atomic_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops are one operator each, as on a GPU; on the CPU their references read values as they like."""
    monkeypatch.setattr(Op, "__call__", lambda self, device, *arguments: self._op(*arguments))


def make_group(shapes: list[tuple[int, int]], seed: int = 0, boxes: int | None = None) -> tuple[Group, Task]:
    """Pictures that share a padded size, and the task of detecting in them."""
    images: list[Pixels] = [make_picture(*shape, seed + i) for i, shape in enumerate(shapes)]
    (batch,) = make_batches(shapes, SPEC, len(shapes), Buckets(None, 32))
    given = None
    if boxes is not None:
        rng = np.random.default_rng(seed)
        corners = [rng.uniform(0, 30, (boxes + i, 2)).astype(np.float32) for i in range(len(shapes))]
        given = [np.hstack([corner, corner + 25]) for corner in corners]
    task = Task(padded_size=batch.padded_size, thresholds=Thresholds.of(SPEC))
    return Group(images, batch.image_sizes, given), task
