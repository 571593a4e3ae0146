"""Any convolutional backbone: what torch exports of networks that this project does not have."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from tests.export.models import randomize_batch_norm
from tests.export.native.comparison import assert_same, kinds, random


class SqueezeExcitation(nn.Module):
    """Hu et al. 2018, as MobileNetV3 has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 2, 1),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layers(x)


class InvertedResidual(nn.Module):
    """Howard et al. 2019, fig. 4: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, channels: int, expanded: int, kernel: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            activation(),
            nn.Conv2d(expanded, expanded, kernel, padding=kernel // 2, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            activation(),
            SqueezeExcitation(expanded),
            nn.Conv2d(expanded, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class SmallMobileNet(nn.Module):
    """The building blocks of MobileNetV3 with two maps and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.blocks = nn.Sequential(
            InvertedResidual(8, 16, 3, nn.ReLU), InvertedResidual(8, 24, 5, nn.Hardswish), nn.Conv2d(8, 16, 2, 2)
        )
        self.lateral = nn.Conv2d(16, 8, 1)
        self.classifier = nn.Sequential(nn.Linear(16, 12), nn.Hardswish(), nn.Dropout(), nn.Linear(12, 5))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.stem(image)
        coarse = self.blocks(fine)
        merged = fine + nn.functional.interpolate(self.lateral(coarse), size=fine.shape[-2:], mode="nearest")
        return merged, coarse, self.classifier(coarse.mean(dim=(2, 3)))


class SmallDenseNet(nn.Module):
    """Concatenations and pre-activation norms (Huang et al. 2017), ReLU6, dilation, average pooling, SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=i + 1, dilation=i + 1) for i in range(3))
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Conv2d(20, 6, 3, padding=1, groups=2)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(image)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(nn.functional.relu6(norm(x)))], dim=1)
        x = self.pool(x)
        y = nn.functional.silu(self.last(x))
        return x, nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")


def export(module: nn.Module) -> ModelProto:
    """As ``torch.onnx`` writes it, with nothing folded by hand; any batch, any multiple of 32."""
    torch.manual_seed(0)
    randomize_batch_norm(module)
    batch, h, w = (torch.export.Dim(name, max=1 << 9) for name in ("batch", "h", "w"))
    shapes: Any = {"image": {0: batch, 2: 32 * h, 3: 32 * w}}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            (torch.zeros(2, 3, 64, 96),),
            dynamo=True,
            opset_version=20,
            optimize=False,
            input_names=["image"],
            dynamic_shapes=shapes,
            verbose=False,
        )
    logger.setLevel(level)
    assert program is not None
    return program.model_proto


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (SmallMobileNet, {"conv", "global_average_pool", "affine", "mul", "flatten", "linear"}),
        (SmallDenseNet, {"conv", "affine", "concat", "average_pool", "mul", "activate", "upsample"}),
    ],
)
def test_backbone(module: type[nn.Module], expected: set[str]) -> None:
    model = export(module())
    network = assert_same(model, random(2, 3, 64, 96), random(1, 3, 32, 32, seed=1))
    assert set(kinds(network)) <= expected | {"add"}
    assert len(network.ops) < len(model.graph.node) / 2
