"""State dicts: one naming, and whether they fit a detector."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fpn_engine.errors import CheckpointError

# What DataParallel, Lightning and torch.compile put before every name.
PREFIXES = ("module.", "model.", "_orig_mod.")

# torchvision before 0.13 had no Sequential around these convolutions.
RENAMED = (
    (re.compile(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"^(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
)

# Branches beside the box head; the boxes do not depend on them.
EXTRA_BRANCHES = {"roi_heads.mask_": "mask", "roi_heads.keypoint_": "keypoint"}

# A name that only this kind of checkpoint has, and what to call it.
FOREIGN = {
    "roi_heads.box_head.0.0.weight": "a detector of the fasterrcnn_resnet50_fpn_v2 kind, whose box head has "
    "convolutions and is not supported yet",
    "head.classification_head.cls_logits.weight": "a RetinaNet or FCOS, not a Faster R-CNN",
    "backbone.bottom_up.stem.conv1.weight": "a Detectron2 checkpoint, whose naming is not supported yet",
    "neck.lateral_convs.0.conv.weight": "an MMDetection checkpoint, whose naming is not supported yet",
    "fc.weight": "an image classifier, not a detector",
}


def normalize_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Today's torchvision names for ``tensors``: wrappers' prefixes stripped, old names replaced."""
    state = dict(tensors)
    while state and (prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in state)), None)):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for pattern, replacement in RENAMED:
        state = {pattern.sub(replacement, name): tensor for name, tensor in state.items()}
    return state


def drop_extra_branches(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` without mask and keypoint branches, and the branches that were dropped."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(EXTRA_BRANCHES))}
    dropped = [branch for prefix, branch in EXTRA_BRANCHES.items() if any(name.startswith(prefix) for name in state)]
    return kept, dropped


def check_fit(state: Mapping[str, Tensor], model: nn.Module, kind: str) -> None:
    """Check that ``state`` has exactly the tensors of ``model``, floating where they are, and all finite.

    ``num_batches_tracked`` may be absent: a FrozenBatchNorm2d does not have it. ``kind`` is what to call the model.

    Raises: CheckpointError naming the first tensors that do not fit.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} has shape {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if missing or unexpected or misshapen:
        raise CheckpointError(f"its tensors do not fit {kind} ({describe_misfits(missing, unexpected, misshapen)})")
    for name, tensor in state.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise CheckpointError(f"{name} has dtype {tensor.dtype}: quantised weights cannot be imported")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds NaN or infinity: the file is damaged or training diverged")


def describe_misfits(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    """The first two names of each kind."""
    parts = [
        f"{label}{', '.join(names[:2])}"
        for label, names in (("missing ", missing), ("unexpected ", unexpected), ("", misshapen))
        if names
    ]
    return "; ".join(parts)
