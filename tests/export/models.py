"""torchvision's detectors, the oracle, and ours with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead

STAGE_NAMES = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}


def make_torchvision_detector(
    arch: str = "resnet18",
    *,
    channels: int = 256,
    num_classes: int = 4,
    representation_size: int = 64,
    rpn_depth: int = 1,
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
    norm_layer: type[nn.Module] = nn.BatchNorm2d,
) -> TorchvisionFasterRCNN:
    """torchvision's own Faster R-CNN, with random weights and plausible batch-norm statistics."""
    torch.manual_seed(0)
    body = getattr(resnet, arch)(weights=None, norm_layer=norm_layer)
    c5 = body.fc.in_features
    backbone = BackboneWithFPN(body, STAGE_NAMES, [c5 // 8, c5 // 4, c5 // 2, c5], channels)
    model = TorchvisionFasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), (ratios,) * 5),
        rpn_head=RPNHead(channels, len(ratios), conv_depth=rpn_depth),
        box_head=TwoMLPHead(channels * 49, representation_size),
        box_predictor=FastRCNNPredictor(representation_size, num_classes),
    )
    randomize_batch_norm(model)
    return model.eval()


def randomize_batch_norm(model: nn.Module) -> None:
    """Statistics as after training: a residual branch small beside its shortcut keeps c5 moderate."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in [*model.named_buffers(), *model.named_parameters()]:
        module = model.get_submodule(name.rpartition(".")[0])
        if hasattr(module, "running_var") and buffer.is_floating_point():
            low, high = {"weight": (0.3, 0.6), "running_var": (0.5, 2.0)}.get(name.rpartition(".")[2], (-0.3, 0.3))
            buffer.data.uniform_(low, high, generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a part of the largest expected magnitude."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def make_hollow_state(**options: Any) -> dict[str, Tensor]:
    """A state dict of torchvision's detector whose tensors each repeat one number, so that its file is small.

    The numbers differ from tensor to tensor: a tensor loaded under a wrong name shows.
    """
    with torch.device("meta"):
        model = make_torchvision_detector(**options)
    return make_hollow(model.state_dict())


def make_hollow(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.tensor(0.001 * (i + 1), dtype=torch.float32).to(tensor.dtype).expand(tensor.shape)
        for i, (name, tensor) in enumerate(state.items())
    }
