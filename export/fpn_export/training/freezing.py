"""Freezing: which weights a run leaves alone (Lin et al. 2017, sec. 5; Ren et al. 2015, sec. 3.2)."""

from __future__ import annotations

from torch import nn

from fpn_export.detector import FpnDetector
from fpn_export.training.recipe import Recipe

STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def set_training_mode(model: FpnDetector, recipe: Recipe) -> None:
    """Put ``model`` into training mode, with its frozen parts fixed: weights, and statistics of batch norms."""
    model.train()
    frozen: list[nn.Module] = []
    for names in STAGES[: recipe.frozen_stages]:
        frozen += [module for name in names if (module := getattr(model.backbone.body, name, None)) is not None]
    if recipe.freeze_norm:
        frozen += [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in frozen:
        module.eval()
        module.requires_grad_(False)


def freeze_shared(model: FpnDetector) -> None:
    """Fix bottom-up network and pyramid, as steps 3 and 4 of alternating training do."""
    model.backbone.eval()
    model.backbone.requires_grad_(False)
