"""State dicts: one naming, and the detector that their tensors' shapes describe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fpn_engine.errors import CheckpointError
from fpn_export.pyramid import FINEST_LEVEL
from fpn_export.resnet import STAGES, STEM_CHANNELS

# What DataParallel, Lightning and torch.compile put before every name.
PREFIXES = ("module.", "model.", "_orig_mod.")

# torchvision before 0.13 had no Sequential around these convolutions.
RENAMED = (
    (re.compile(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"^(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
)

# Branches beside the box head; the boxes do not depend on them.
EXTRA_BRANCHES = {"roi_heads.mask_": "mask", "roi_heads.keypoint_": "keypoint"}

REQUIRED = (
    "backbone.body.conv1.weight",
    "backbone.fpn.inner_blocks.0.0.weight",
    "backbone.fpn.layer_blocks.0.0.weight",
    "roi_heads.box_head.fc6.weight",
    "roi_heads.box_predictor.cls_score.weight",
)
REQUIRED_OF_RPN = ("rpn.head.conv.0.0.weight", "rpn.head.cls_logits.weight")
KNOWN_PREFIXES = (
    "backbone.body.",
    "backbone.fpn.",
    "rpn.head.",
    "roi_heads.box_head.fc",
    "roi_heads.box_predictor.",
)

# A name that only this kind of checkpoint has, and what to call it.
FOREIGN = {
    "roi_heads.box_head.0.0.weight": "a detector of the fasterrcnn_resnet50_fpn_v2 kind, whose box head has "
    "convolutions and is not supported yet",
    "head.classification_head.cls_logits.weight": "a RetinaNet or FCOS, not a Faster R-CNN",
    "backbone.bottom_up.stem.conv1.weight": "a Detectron2 checkpoint, whose naming is not supported yet",
    "neck.lateral_convs.0.conv.weight": "an MMDetection checkpoint, whose naming is not supported yet",
    "fc.weight": "an image classifier, not a detector",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorShape:
    """What the shapes of the tensors say about a detector.

    ``num_outputs`` counts the pyramid's 3x3 convolutions (p6 has none). Without an RPN ``rpn_depth`` and
    ``num_anchors`` are 0.
    """

    arch: str
    fpn_channels: int
    finest_level: int
    num_outputs: int
    num_classes: int
    representation_size: int
    pool_size: int
    rpn_depth: int
    num_anchors: int


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


def infer_shape(state: Mapping[str, Tensor]) -> DetectorShape:
    """Read architecture, widths and counts off the shapes of ``state``, named as today's torchvision.

    Raises: CheckpointError for a state dict that is not a Fast or Faster R-CNN on a ResNet pyramid.
    """
    foreign = next((kind for name, kind in FOREIGN.items() if name in state), None)
    has_rpn = any(name.startswith("rpn.") for name in state)
    required = REQUIRED + (REQUIRED_OF_RPN if has_rpn else ())
    missing = [name for name in required if name not in state]
    if foreign or missing:
        unexpected = [name for name in state if not name.startswith(KNOWN_PREFIXES)]
        kind = foreign or "not a Faster R-CNN on a ResNet feature pyramid"
        raise CheckpointError(f"it is {kind} ({_describe_misfits(missing, unexpected, [])})")
    arch = _infer_arch(state)
    fpn_channels, lateral_channels, *_ = _shape_of(state, "backbone.fpn.inner_blocks.0.0.weight", 4)
    representation_size, pooled = _shape_of(state, "roi_heads.box_head.fc6.weight", 2)
    pool_size = math.isqrt(pooled // fpn_channels)
    if pool_size**2 * fpn_channels != pooled:
        raise CheckpointError(
            f"roi_heads.box_head.fc6.weight takes {pooled} inputs, which is not {fpn_channels} channels of a square RoI"
        )
    return DetectorShape(
        arch=arch,
        fpn_channels=fpn_channels,
        finest_level=_infer_finest_level(arch, lateral_channels),
        num_outputs=_count(state, r"backbone\.fpn\.layer_blocks\.\d+\.0\.weight"),
        num_classes=_shape_of(state, "roi_heads.box_predictor.cls_score.weight", 2)[0],
        representation_size=representation_size,
        pool_size=pool_size,
        rpn_depth=_count(state, r"rpn\.head\.conv\.\d+\.0\.weight"),
        num_anchors=_shape_of(state, "rpn.head.cls_logits.weight", 4)[0] if has_rpn else 0,
    )


def check_fit(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check that ``state`` has exactly the tensors of ``model``, floating where they are, and all finite.

    ``num_batches_tracked`` may be absent: a FrozenBatchNorm2d does not have it.

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
        raise CheckpointError(
            f"its tensors do not fit a Faster R-CNN ({_describe_misfits(missing, unexpected, misshapen)})"
        )
    for name, tensor in state.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise CheckpointError(f"{name} has dtype {tensor.dtype}: quantised weights cannot be imported")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds NaN or infinity: the file is damaged or training diverged")


def _infer_arch(state: Mapping[str, Tensor]) -> str:
    depths = tuple(_count(state, rf"backbone\.body\.layer{stage}\.\d+\.conv1\.weight") for stage in (1, 2, 3, 4))
    bottleneck = "backbone.body.layer1.0.conv3.weight" in state
    for arch, (block, known) in STAGES.items():
        if known == depths and (block.expansion > 1) == bottleneck:
            return arch
    kind = "bottleneck" if bottleneck else "basic"
    raise CheckpointError(f"its bottom-up network has {depths} {kind} blocks, which is none of {', '.join(STAGES)}")


def _infer_finest_level(arch: str, lateral_channels: int) -> int:
    expansion = STAGES[arch][0].expansion
    widths = [STEM_CHANNELS * 2**i * expansion for i in range(4)]
    if lateral_channels not in widths:
        raise CheckpointError(
            f"backbone.fpn.inner_blocks.0.0.weight takes {lateral_channels} channels, but c2..c5 of {arch} "
            f"have {widths}"
        )
    return FINEST_LEVEL + widths.index(lateral_channels)


def _shape_of(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(f"{name} has shape {shape}, but {ndim} non-zero sides were expected")
    return shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in state)


def _describe_misfits(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    """The first two of each kind."""
    parts = [
        f"{label}{', '.join(names[:2])}"
        for label, names in (("missing ", missing), ("unexpected ", unexpected), ("", misshapen))
        if names
    ]
    return "; ".join(parts)
