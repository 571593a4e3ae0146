"""Small detectors of every system, with random weights whose answers are spread enough to prove something."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.detector import FpnDetector, make_detector
from fpn_export.systems import make_system
from tests.export.models import randomize_batch_norm

BASE = ModelSpec(
    categories=numbered_categories(3),
    arch="resnet18",
    body_width=8,
    fpn_channels=16,
    min_size=64,
    max_size=128,
    anchor_sizes=((8.0,), (16.0,), (32.0,), (64.0,), (128.0,)),
    canonical_size=28,  # an eighth of the usual, as the images are, so that RoIs come from every level
    rpn_pre_nms_top_n_test=100,
    rpn_post_nms_top_n_test=60,
    box_detections_per_img=40,
)
SIZE = (64, 96)
REPRESENTATION_SIZE = 32
OBJECTNESS_SPREAD, DELTA_SPREAD, LOGIT_SPREAD = 2.0, 0.3, 2.0


def make_random_system(system: str, model: str, **changes: Any) -> FpnDetector:
    """The system on a small base, in eval mode; ``changes`` are further fields of its spec."""
    torch.manual_seed(0)
    spec = dataclasses.replace(make_system(BASE, system, model), **changes)
    detector = make_detector(spec, representation_size=REPRESENTATION_SIZE).eval()
    randomize_batch_norm(detector)
    with torch.no_grad():
        _spread(detector)
    return detector


def make_images(count: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    """(count, 3, *size) of noise in cells of 8 pixels."""
    noise = torch.randn(count, 3, size[0] // 8, size[1] // 8, generator=torch.Generator().manual_seed(5))
    return nn.functional.interpolate(noise, scale_factor=8, mode="nearest")


def make_rois(count: int = 60, images: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    """(count * images, 5) RoIs inside the images, from a few pixels to most of them, as many in each."""
    generator = torch.Generator().manual_seed(6)
    low = torch.rand(count * images, 2, generator=generator) * 0.7
    high = low + (1 - low) * (0.1 + 0.9 * torch.rand(count * images, 2, generator=generator))
    scale = torch.tensor([size[1], size[0]])
    number = torch.arange(images).repeat_interleave(count)[:, None]
    return torch.cat([number, low * scale, high * scale], dim=1)


def _spread(detector: FpnDetector) -> None:
    """Scale the last layers by what they answer on noise."""
    images = make_images()
    out = detector.trunk(images)
    if detector.has_rpn:
        head = detector.rpn["head"]
        heads = list(head) if isinstance(head, nn.ModuleList) else [head]
        for number, one in enumerate(heads):
            levels = slice(number, number + 1) if len(heads) > 1 else slice(None)
            _normalize(one.cls_logits, out.objectness[levels], OBJECTNESS_SPREAD)
            _normalize(one.bbox_pred, out.deltas[levels], DELTA_SPREAD)
    if detector.has_box_head:
        class_logits, box_deltas = detector.head(detector.pipeline.pool(out, make_rois()))
        predictor = detector.roi_heads["box_predictor"]
        _normalize(predictor.cls_score, [class_logits[..., None, None]], LOGIT_SPREAD)
        _normalize(predictor.bbox_pred, [box_deltas[..., None, None]], 1.0)


def _normalize(layer: Any, outputs: Any, spread: float) -> None:
    """Give each channel of (N, C, H, W) outputs mean 0 and standard deviation ``spread``."""
    rows = torch.cat([output.transpose(0, 1).flatten(1) for output in outputs], dim=1)
    scale = spread / rows.std(dim=1)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.copy_((layer.bias - rows.mean(dim=1)) * scale)
