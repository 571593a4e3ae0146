"""A detector with random weights that prove something: moderate activations and many detections."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import BasicBlock, Bottleneck

from fpn_engine.spec import ModelSpec, numbered_categories
from tests.parity.torchvision_oracle import Oracle, Pixels, build_oracle

REPRESENTATION_SIZE = 64
OBJECTNESS_SPREAD, LOGIT_SPREAD = 2.0, 2.0  # scores from near 0 to near 1
DELTA_SPREAD = 0.3  # proposals a third larger or smaller than their anchors
BRANCH = 0.25
BACKGROUND = 9.2  # so that some images have fewer detections than are allowed
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, nn.MaxPool2d)
BOX_DELTA_SPREAD = 1.0  # a tenth of a side after the weights of 10


SMALL = ModelSpec(
    categories=numbered_categories(5),
    fpn_channels=64,
    min_size=160,
    max_size=256,
    # A quarter of the usual, as the images are, so that every level has something to say.
    anchor_sizes=((8.0,), (16.0,), (32.0,), (64.0,), (128.0,)),
    canonical_size=56,
)


def make_random_detector(
    arch: str, spec: ModelSpec = SMALL, representation_size: int = REPRESENTATION_SIZE
) -> tuple[ModelSpec, TorchvisionFasterRCNN]:
    """Random weights, batch norms that know their inputs' statistics, heads scaled to say something."""
    torch.manual_seed(7)
    spec = dataclasses.replace(spec, arch=arch)
    model = build_oracle(spec, representation_size=representation_size)
    with torch.no_grad():
        _calibrate(model, torch.cat([Oracle(model).resized(make_picture(120, 160, seed)).tensors for seed in range(4)]))
    return spec, model


def make_picture(height: int, width: int, seed: int = 0) -> Pixels:
    """Noise at several scales, as a photograph has detail at several scales."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.zeros(1, 3, height, width)
    for cell in (1, 4, 16, 48):
        noise = torch.rand(1, 3, -(-height // cell), -(-width // cell), generator=generator)
        picture += nn.functional.interpolate(noise, size=(height, width), mode="nearest")
    return np.ascontiguousarray((picture[0] / 4 * 255).to(torch.uint8).permute(1, 2, 0).numpy())


def largest_activation(model: nn.Module, image: Pixels) -> float:
    """The largest magnitude that any layer of torchvision's model puts out on the way to its detections."""
    largest = [0.0]

    def look(module: nn.Module, inputs: object, output: Tensor) -> None:
        largest.append(output.abs().max().item() if output.numel() else 0.0)

    hooks = [layer.register_forward_hook(look) for layer in model.modules() if isinstance(layer, LAYERS)]
    Oracle(model).detect(image)
    for hook in hooks:
        hook.remove()
    assert len(largest) > 20
    return max(largest)


def _calibrate(model: TorchvisionFasterRCNN, batch: Tensor) -> None:
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.weight.uniform_(0.5, 1.0)
        norm.bias.uniform_(-0.2, 0.2)
        norm.train()
        norm.momentum = 1.0  # the statistics of this batch alone
    # A branch small beside its shortcut, as after training; as large, a hundred layers make noise of rounding.
    for block in (module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)):
        (block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight.mul_(BRANCH)
    model.backbone(batch)
    model.eval()

    features = model.backbone(batch)
    levels = list(features.values())
    hidden = torch.cat([model.rpn.head.conv(level).flatten(2) for level in levels], dim=2).transpose(1, 2).flatten(0, 1)
    _spread(model.rpn.head.cls_logits, hidden, OBJECTNESS_SPREAD)
    _spread(model.rpn.head.bbox_pred, hidden, DELTA_SPREAD)

    sizes = [(batch.shape[-2], batch.shape[-1])] * len(batch)
    images = ImageList(batch, sizes)
    proposals, _ = model.rpn(images, features)
    pooled = model.roi_heads.box_head(model.roi_heads.box_roi_pool(features, proposals, sizes))
    _spread(model.roi_heads.box_predictor.cls_score, pooled, LOGIT_SPREAD)
    model.roi_heads.box_predictor.cls_score.bias[0] += BACKGROUND
    _spread(model.roi_heads.box_predictor.bbox_pred, pooled, BOX_DELTA_SPREAD)


def _spread(layer: nn.Conv2d | nn.Linear, inputs: Tensor, spread: float) -> None:
    """Give each output of a linear or 1x1 layer mean 0 and standard deviation ``spread`` over (rows, C) inputs."""
    weight = layer.weight.flatten(1)
    outputs = inputs @ weight.T
    scale = spread / outputs.std(dim=0)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.copy_(-outputs.mean(dim=0) * scale)
