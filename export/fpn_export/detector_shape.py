"""The detector that the shapes of a state dict's tensors describe."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fpn_engine.errors import CheckpointError
from fpn_engine.spec import COARSEST_STAGE, FINEST_STAGE
from fpn_export.resnet import STAGES, stage_widths
from fpn_export.state_dict import FOREIGN, describe_misfits

STEM = "backbone.body.conv1.weight"
LATERAL = "backbone.fpn.inner_blocks.0.0.weight"
OUTPUT = "backbone.fpn.layer_blocks.0.0.weight"
FC6 = "roi_heads.box_head.fc6.weight"
CONV5 = "roi_heads.box_head.layer4."
PREDICTOR = "roi_heads.box_predictor.cls_score.weight"
KNOWN_PREFIXES = (
    "backbone.body.",
    "backbone.fpn.",
    "rpn.head.",
    "roi_heads.box_head.fc",
    CONV5,
    "roi_heads.box_predictor.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorShape:
    """What the shapes of the tensors say about a detector.

    Attributes:
        model: one of ``fpn_engine.spec.MODELS``, by the parts that are there.
        archs, pyramids: those that the tensors fit, the likeliest first.
        feature_channels: of the maps that RPN and RoIs see, which of a pyramid are ``fpn_channels``.
        finest_level: of the levels; of a top-down pyramid the finest if its levels reach p5.
        num_outputs: levels with a 3x3 convolution or, without a pyramid, a stage of their own (p6 has none).
        num_classes, representation_size, box_head: of the box head; 0, 0 and two_mlp without one.
        pool_size: side of its RoIs; 0 if not shown, as of conv5.
        rpn_depth, num_anchors: of the RPN; 0 without one. num_heads: 0 if all levels share one.
    """

    model: str
    archs: tuple[str, ...]
    body_width: int
    pyramids: tuple[str, ...]
    feature_channels: int
    finest_level: int
    num_outputs: int
    num_classes: int
    representation_size: int
    box_head: str
    pool_size: int
    rpn_depth: int
    num_anchors: int
    num_heads: int


def infer_shape(state: Mapping[str, Tensor]) -> DetectorShape:
    """Read architecture, widths and counts off the shapes of ``state``, named as today's torchvision.

    Raises: CheckpointError for a state dict that is none of the detectors of ``fpn_engine.spec.MODELS`` on a ResNet.
    """
    has_rpn, has_head = (any(name.startswith(part) for name in state) for part in ("rpn.", "roi_heads."))
    has_pyramid = any(name.startswith("backbone.fpn.") for name in state)
    rpn = "rpn.head.0." if any(name.startswith("rpn.head.0.") for name in state) else "rpn.head."
    conv5 = any(name.startswith(CONV5) for name in state)
    neither = not has_rpn and not has_head
    required = [STEM]
    required += [LATERAL, OUTPUT] if has_pyramid or neither else []
    required += [f"{rpn}conv.0.0.weight", f"{rpn}cls_logits.weight"] if has_rpn or neither else []
    required += [PREDICTOR, *([] if conv5 else [FC6])] if has_head or neither else []
    _require(state, required)

    body_width = _shape_of(state, STEM, 4)[0]
    archs, stage = _infer_archs(state)
    widths = [width * STAGES[archs[0]][0].expansion for width in stage_widths(body_width)]
    if has_pyramid:
        channels, lateral_channels, *_ = _shape_of(state, LATERAL, 4)
        if lateral_channels not in widths:
            raise CheckpointError(
                f"{LATERAL} takes {lateral_channels} channels, but c2..c5 of {archs[0]} have {widths}"
            )
        num_outputs = _count(state, r"backbone\.fpn\.layer_blocks\.\d+\.0\.weight")
        finest = FINEST_STAGE + widths.index(lateral_channels)
        pyramids = _fitting_pyramids(
            stage, finest, _count(state, r"backbone\.fpn\.inner_blocks\.\d+\.0\.weight"), num_outputs
        )
        if pyramids[0] == "top_down":
            finest = COARSEST_STAGE + 1 - num_outputs
    else:
        pyramids, num_outputs, finest, channels = ("none",), 1, stage, widths[stage - FINEST_STAGE]
    return DetectorShape(
        model="faster_rcnn" if has_rpn and has_head else "rpn" if has_rpn else "fast_rcnn",
        archs=archs,
        body_width=body_width,
        pyramids=pyramids,
        feature_channels=channels,
        finest_level=finest,
        num_outputs=num_outputs,
        num_classes=_shape_of(state, PREDICTOR, 2)[0] if has_head else 0,
        representation_size=_shape_of(state, FC6, 2)[0] if has_head and not conv5 else 0,
        box_head="conv5" if conv5 else "two_mlp",
        pool_size=_infer_pool_size(state, channels) if has_head and not conv5 else 0,
        rpn_depth=_count(state, rf"{re.escape(rpn)}conv\.\d+\.0\.weight"),
        num_anchors=_shape_of(state, f"{rpn}cls_logits.weight", 4)[0] if has_rpn else 0,
        num_heads=_count(state, r"rpn\.head\.\d+\.cls_logits\.weight"),
    )


def _require(state: Mapping[str, Tensor], names: list[str]) -> None:
    foreign = next((kind for name, kind in FOREIGN.items() if name in state), None)
    missing = [name for name in names if name not in state]
    if foreign or missing:
        unexpected = [name for name in state if not name.startswith(KNOWN_PREFIXES)]
        kind = foreign or "not a Faster R-CNN on a ResNet feature pyramid"
        raise CheckpointError(f"it is {kind} ({describe_misfits(missing, unexpected, [])})")


def _infer_archs(state: Mapping[str, Tensor]) -> tuple[tuple[str, ...], int]:
    """The architectures that have the body's blocks, and its last stage; a conv5 head counts as the fifth."""
    prefixes = [rf"backbone\.body\.layer{number}" for number in (1, 2, 3, 4)]
    depths = [_count(state, rf"{prefix}\.\d+\.conv1\.weight") for prefix in prefixes]
    stages = len(depths) - depths.count(0)
    depths[stages:] = [_count(state, rf"{re.escape(CONV5)}\d+\.conv1\.weight")]
    counted = tuple(depths[: stages + 1] if depths[stages] else depths[:stages])
    bottleneck = "backbone.body.layer1.0.conv3.weight" in state
    archs = tuple(
        arch
        for arch, (block, known) in STAGES.items()
        if counted and known[: len(counted)] == counted and (block.expansion > 1) == bottleneck
    )
    if not archs:
        kind = "bottleneck" if bottleneck else "basic"
        raise CheckpointError(
            f"its bottom-up network has {counted} {kind} blocks, which is none of {', '.join(STAGES)}"
        )
    return archs, stages + 1


def _fitting_pyramids(stage: int, finest: int, num_laterals: int, num_outputs: int) -> tuple[str, ...]:
    """The pyramids with so many convolutions on a body that ends at ``stage``; ``finest`` is the first lateral's."""
    if num_laterals == 1 and num_outputs > 1:
        return ("top_down",)
    if stage < COARSEST_STAGE:
        return ("bottom_up",)
    if num_laterals != num_outputs:
        return ("fpn",)
    return ("fpn", "bottom_up", "top_down") if finest == COARSEST_STAGE else ("fpn", "bottom_up")


def _infer_pool_size(state: Mapping[str, Tensor], channels: int) -> int:
    pooled = _shape_of(state, FC6, 2)[1]
    pool_size = math.isqrt(pooled // channels)
    if pool_size**2 * channels != pooled:
        raise CheckpointError(f"{FC6} takes {pooled} inputs, which is not {channels} channels of a square RoI")
    return pool_size


def _shape_of(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape)
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(f"{name} has shape {shape}, but {ndim} non-zero sides were expected")
    return shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in state)
