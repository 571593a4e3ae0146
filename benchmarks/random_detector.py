"""A Faster R-CNN with random weights that behaves like a trained one: bounded activations, many detections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.detector import FasterRCNN

CALIBRATION_SIZE = (256, 320)
LARGEST_ACTIVATION = 100.0


def make_random_detector(arch: str = "resnet50", num_categories: int = 90, seed: int = 0) -> FasterRCNN:
    """A seeded detector in eval mode.

    Batch norms take their statistics from noise, so that activations keep their scale through the network; the heads
    are scaled until objectness, class scores and boxes spread as in a trained model.
    """
    torch.manual_seed(seed)
    spec = ModelSpec(arch=arch, categories=numbered_categories(num_categories))
    model = FasterRCNN(spec)
    images = torch.randn(2, 3, *CALIBRATION_SIZE)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the running statistics become those of the one batch
    with torch.no_grad():
        model.train()
        model.pyramid(images)
        model.eval()
        out = model.trunk(images)
        largest = max(float(level.abs().max()) for level in out.features)
        if largest > LARGEST_ACTIVATION:
            raise RuntimeError(f"activations reach {largest:.0f}; fp16 and comparisons would prove little")
        head = model.rpn["head"]
        _rescale(head.cls_logits, torch.cat([o.flatten() for o in out.objectness]), 3.0)
        _rescale(head.bbox_pred, torch.cat([d.flatten() for d in out.deltas]), 0.3)
        size = spec.box_roi_pool.output_size
        scale = float(out.features[0].std())
        logits, deltas = model.head(torch.randn(256, spec.fpn_channels, size, size) * scale)
        predictor = model.roi_heads["box_predictor"]
        _rescale(predictor.cls_score, logits, 3.0)
        _rescale(predictor.bbox_pred, deltas, 0.5)
    return model


def _rescale(layer: nn.Conv2d | nn.Linear, output: Tensor, spread: float) -> None:
    """Scale the weight so that ``output`` would have had this standard deviation."""
    layer.weight.mul_(spread / output.std())
