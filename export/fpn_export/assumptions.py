"""The whole ModelSpec of a checkpoint: from its tensors, from what the user states, and from defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fpn_engine.errors import CheckpointError
from fpn_engine.spec import Category, ModelSpec, numbered_categories
from fpn_export.coco_categories import COCO_CATEGORIES
from fpn_export.pyramid import COARSEST_STAGE
from fpn_export.state_dict import DetectorShape

# Fields that tensors do not show, in the order in which a user should care. size_divisor has one value only.
GROUPS = {
    "resize": ("min_size", "max_size"),
    "normalisation": ("channel_order", "image_mean", "image_std"),
    "levels": ("levels", "roi_levels"),
    "anchors": ("anchor_sizes", "aspect_ratios"),
    "proposals": (
        "rpn_pre_nms_top_n_test",
        "rpn_post_nms_top_n_test",
        "rpn_nms_thresh",
        "rpn_score_thresh",
        "rpn_min_size",
    ),
    "pooling": ("box_roi_pool", "canonical_level", "canonical_size"),
    "detections": (
        "bbox_reg_weights",
        "box_score_thresh",
        "box_nms_thresh",
        "box_detections_per_img",
        "box_min_size",
    ),
    "batch norm": ("batch_norm_eps",),
}


def complete_spec(shape: DetectorShape, stated: Mapping[str, Any]) -> tuple[ModelSpec, list[str]]:
    """Put together what the tensors show (``shape``), what is ``stated`` and defaults for the rest.

    Args:
        shape: see :func:`fpn_export.state_dict.infer_shape`.
        stated: ModelSpec fields as JSON values; ``box_roi_pool`` may be partial.

    Returns: the spec, and one sentence for each group of values that is only assumed.
    Raises: SpecError for an unknown key or a value out of range; CheckpointError where ``stated`` and the
        tensors contradict each other.
    """
    spec = ModelSpec.from_dict(merge_values(_default_values(shape, stated), stated))
    _check_agreement(spec, shape)
    return spec, _list_assumptions(spec, stated)


def merge_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Spec values of ``first``, overridden by ``second``; ``box_roi_pool`` is merged key by key."""
    merged = {**first, **second}
    pools = [values.get("box_roi_pool") for values in (first, second)]
    if all(isinstance(pool, Mapping) for pool in pools):
        merged["box_roi_pool"] = {**pools[0], **pools[1]}  # type: ignore[dict-item]
    return merged


def _default_values(shape: DetectorShape, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Values for everything that the tensors show or hint at; ModelSpec has the others."""
    levels = _default_levels(shape, stated)
    return {
        "model": "faster_rcnn" if shape.num_anchors else "fast_rcnn",
        "arch": shape.arch,
        "fpn_channels": shape.fpn_channels,
        "categories": [dataclasses.asdict(category) for category in _default_categories(shape)],
        "levels": levels,
        "roi_levels": [level for level in levels if level <= COARSEST_STAGE],
        "anchor_sizes": [[8.0 * 2**level] for level in levels],  # 32 on p2 (sec. 4.1)
        "box_roi_pool": {"output_size": shape.pool_size},
    }


def _default_levels(shape: DetectorShape, stated: Mapping[str, Any]) -> Sequence[int]:
    """The stated levels, else as many as there are anchor sizes, else up to p6."""
    levels, sizes = stated.get("levels"), stated.get("anchor_sizes")
    if isinstance(levels, list | tuple) and all(isinstance(level, int) for level in levels):
        return levels
    count = len(sizes) if isinstance(sizes, list | tuple) else COARSEST_STAGE + 2 - shape.finest_level
    return range(shape.finest_level, shape.finest_level + count)


def _default_categories(shape: DetectorShape) -> tuple[Category, ...]:
    if shape.num_classes == len(COCO_CATEGORIES) + 1:
        return COCO_CATEGORIES
    return numbered_categories(shape.num_classes - 1)


def _check_agreement(spec: ModelSpec, shape: DetectorShape) -> None:
    if spec.model == "faster_rcnn" and not shape.num_anchors:
        raise CheckpointError("its model is given as faster_rcnn, but it has no rpn.head tensors")
    coarsest = shape.finest_level + shape.num_outputs - 1
    allowed = {coarsest, coarsest + 1} if coarsest == COARSEST_STAGE else {coarsest}
    if spec.levels[-1] not in allowed:
        raise CheckpointError(
            f"its specification has levels p{spec.levels[0]}..p{spec.levels[-1]}, but its tensors make "
            f"p{shape.finest_level}..p{max(allowed)}: state one entry of anchor_sizes for each level"
        )
    pairs = [
        ("arch", spec.arch, shape.arch),
        ("fpn_channels", spec.fpn_channels, shape.fpn_channels),
        ("the number of categories", len(spec.categories), shape.num_classes - 1),
        ("the finest of levels", spec.levels[0], shape.finest_level),
        ("box_roi_pool.output_size", spec.box_roi_pool.output_size, shape.pool_size),
    ]
    if spec.model == "faster_rcnn":
        anchors = "the number of anchors per location (anchor_sizes of a level times aspect_ratios)"
        pairs.append((anchors, spec.num_anchors, shape.num_anchors))
    for name, given, found in pairs:
        if given != found:
            raise CheckpointError(
                f"{name} is {given} by its specification (JSON, options or defaults), but {found} by its tensors"
            )


def _list_assumptions(spec: ModelSpec, stated: Mapping[str, Any]) -> list[str]:
    sentences = [] if "categories" in stated else [_describe_categories(spec)]
    values = spec.to_dict()
    for group, names in GROUPS.items():
        assumed = [f"{name} {json.dumps(values[name])}" for name in names if not _is_stated(name, stated)]
        if group == "anchors" and spec.model == "fast_rcnn":
            continue
        if assumed:
            sentences.append(f"assumed {group}: {', '.join(assumed)}")
    return sentences


def _is_stated(name: str, stated: Mapping[str, Any]) -> bool:
    if name == "box_roi_pool":  # its output_size is in the tensors
        return {"sampling_ratio", "aligned"} <= set(stated.get(name, ()))
    # A list of anchor sizes says how many levels there are; the maps pooled from follow from them.
    if name in GROUPS["levels"]:
        return name in stated or "anchor_sizes" in stated
    return name in stated


def _describe_categories(spec: ModelSpec) -> str:
    if spec.categories == COCO_CATEGORIES:
        return 'assumed categories: 91 classes without names are COCO\'s, ids 1 to 90 with "N/A" in the gaps'
    names = [category.name for category in spec.categories]
    shown = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
    return f"assumed categories: {shown}, with ids from 1"
