"""Folding batch norm changes the form of a detector, not its answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.batch_norm import fold_batch_norm
from fpn_export.detector import FasterRCNN
from tests.export.models import randomize_batch_norm, relative_error


@pytest.fixture(params=["resnet18", "resnet50"])
def model(request: pytest.FixtureRequest) -> FasterRCNN:
    torch.manual_seed(0)
    spec = ModelSpec(categories=numbered_categories(2), arch=request.param, fpn_channels=32)
    model = FasterRCNN(spec, representation_size=16)
    randomize_batch_norm(model)
    return model.eval()


@torch.inference_mode()
def test_folded_trunk_gives_the_same_outputs(model: FasterRCNN) -> None:
    images = torch.randn(1, 3, 128, 160)
    before, after = model.trunk(images), fold_batch_norm(model).trunk(images)
    for expected, actual in zip(before, after, strict=True):
        assert max(map(relative_error, actual, expected)) < 1e-4


def test_folding_leaves_no_batch_norm_and_the_original_alone(model: FasterRCNN) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_batch_norm(model.train())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(conv.bias is not None for conv in folded.modules() if isinstance(conv, nn.Conv2d))
    assert not folded.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_folding_by_hand() -> None:
    """gamma 3, beta 1, mean 2, variance 15, eps 1: (2x + 4 - 2) * 3 / 4 + 1 = 1.5 x + 2.5."""
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1.0)
    values = (conv.weight, 2), (conv.bias, 4), (norm.weight, 3), (norm.bias, 1)
    for parameter, value in values:
        nn.init.constant_(parameter, value)
    norm.running_mean.fill_(2)
    norm.running_var.fill_(15)
    folded = fold_batch_norm(nn.Sequential(conv, norm))
    assert folded[0].weight.item() == 1.5
    assert folded[0].bias.item() == 2.5
