"""A mask-proposal model small enough for tests, with weights that tell places apart."""

from __future__ import annotations

import torch

from fpn_engine.masks.spec import MaskSpec
from fpn_export.masks.model import FpnMasks

SIDE = 96


def tiny_spec(**changes: object) -> MaskSpec:
    values = {
        "arch": "resnet18",
        "body_width": 8,
        "fpn_channels": 16,
        "hidden_channels": 24,
        "min_size": SIDE,
        "max_size": 2 * SIDE,
        "masks_per_img": 100,
    }
    return MaskSpec(**(values | changes))  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **changes: object) -> FpnMasks:
    """In eval mode; scores and masks of about unit spread, where fresh weights would make them all alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FpnMasks(tiny_spec(**changes)).eval()
        for head in model.mask_heads:
            for layer in (head.mask, head.score):
                torch.nn.init.normal_(layer.weight, std=0.3)
            torch.nn.init.normal_(head.mask.bias, std=0.3)
        torch.nn.init.normal_(model.mask_heads[-1].conv.bias, std=0.3)  # the first has none to speak of
    return model


def random_images(n: int = 2, height: int = 96, width: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
