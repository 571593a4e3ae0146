"""The whole ModelSpec of a checkpoint: from its tensors, from what the user states, and from defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fpn_engine.errors import CheckpointError
from fpn_engine.spec import COARSEST_STAGE, OBJECT, Category, ModelSpec, numbered_categories
from fpn_export.coco_categories import COCO_CATEGORIES
from fpn_export.detector_shape import DetectorShape

ANCHOR_SIZE = 32.0  # pixels, the smallest (sec. 4.1)
CONV5_POOL_SIZE = 14  # bins per side in front of stage 5, whose stride is 2 (He et al. 2016, sec. 4.3)
# Fields that tensors do not show, in the order in which a user should care. size_divisor has one value only, and a
# pyramid with laterals and outputs on every level is taken for an fpn.
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
OF_THE_RPN = (*GROUPS["anchors"], *GROUPS["proposals"])
# The number of detections is that of an RPN alone too.
OF_THE_BOX_HEAD = ("roi_levels", *GROUPS["pooling"], *(set(GROUPS["detections"]) - {"box_detections_per_img"}))


def complete_spec(shape: DetectorShape, stated: Mapping[str, Any]) -> tuple[ModelSpec, list[str]]:
    """Put together what the tensors show (``shape``), what is ``stated`` and defaults for the rest.

    Args:
        shape: see :func:`fpn_export.detector_shape.infer_shape`.
        stated: ModelSpec fields as JSON values; ``box_roi_pool`` may be partial.

    Returns: the spec, and one sentence for each group of values that is only assumed.
    Raises: SpecError for an unknown key or a value out of range; CheckpointError where ``stated`` and the
        tensors contradict each other.
    """
    values = merge_values(_default_values(shape, stated), stated)
    if values["model"] == "rpn" and shape.num_classes:  # the categories are those of the box head, which is left out
        values["categories"] = [dataclasses.asdict(OBJECT)]
    spec = ModelSpec.from_dict(values)
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
    values: dict[str, Any] = {
        "model": shape.model,
        "arch": shape.archs[0],
        "body_width": shape.body_width,
        "pyramid": shape.pyramids[0],
        "rpn_head_shared": shape.num_heads == 0,
        "box_head": shape.box_head,
        "categories": [dataclasses.asdict(category) for category in _default_categories(shape)],
        "levels": levels,
        "roi_levels": [level for level in levels if level <= COARSEST_STAGE],
        "anchor_sizes": _default_anchor_sizes(levels, shape, stated),
        "box_roi_pool": {"output_size": shape.pool_size or CONV5_POOL_SIZE},
    }
    return values if shape.pyramids == ("none",) else {**values, "fpn_channels": shape.feature_channels}


def _default_levels(shape: DetectorShape, stated: Mapping[str, Any]) -> Sequence[int]:
    """The stated levels, else as many as there are anchor sizes or RPN heads, else those of the tensors and p6."""
    levels, sizes = stated.get("levels"), stated.get("anchor_sizes")
    if isinstance(levels, list | tuple) and all(isinstance(level, int) for level in levels):
        return levels
    count = len(sizes) if isinstance(sizes, list | tuple) else shape.num_heads or len(_possible_levels(shape))
    return range(shape.finest_level, shape.finest_level + count)


def _default_anchor_sizes(
    levels: Sequence[int], shape: DetectorShape, stated: Mapping[str, Any]
) -> Sequence[Sequence[float]]:
    """One size for each level, 32 on p2 (sec. 4.1); on a single map as many as the tensors show, from 32 (table 1)."""
    ratios = stated.get("aspect_ratios")
    sizes = shape.num_anchors // (len(ratios) if isinstance(ratios, list | tuple) and ratios else 3)
    if len(levels) == 1 and sizes > 1:
        return [[ANCHOR_SIZE * 2**i for i in range(sizes)]]
    return [[ANCHOR_SIZE / 4 * 2**level] for level in levels]


def _default_categories(shape: DetectorShape) -> tuple[Category, ...]:
    if not shape.num_classes:
        return (OBJECT,)
    if shape.num_classes == len(COCO_CATEGORIES) + 1:
        return COCO_CATEGORIES
    return numbered_categories(shape.num_classes - 1)


def _possible_levels(shape: DetectorShape, finest: int | None = None) -> range:
    """All levels that the tensors can make; p6 has none of its own and may be left out."""
    first = finest or shape.finest_level
    coarsest = first + shape.num_outputs - 1
    has_p6 = coarsest == COARSEST_STAGE and shape.pyramids != ("none",)
    return range(first, coarsest + 1 + has_p6)


def _check_agreement(spec: ModelSpec, shape: DetectorShape) -> None:
    for needed, found, part in (
        (spec.has_rpn, shape.num_anchors, "rpn.head"),
        (spec.has_box_head, shape.num_classes, "roi_heads"),
    ):
        if needed and not found:
            raise CheckpointError(f"its model is given as {spec.model}, but it has no {part} tensors")
    _require_equal("pyramid", spec.pyramid, shape.pyramids)
    _check_levels(spec, shape)
    _require_equal("arch", spec.arch, shape.archs)
    _require_equal("body_width", spec.body_width, [shape.body_width])
    if spec.pyramid != "none":
        _require_equal("fpn_channels", spec.fpn_channels, [shape.feature_channels])
    if spec.has_box_head:
        _require_equal("the number of categories", len(spec.categories), [shape.num_classes - 1])
        _require_equal("box_head", spec.box_head, [shape.box_head])
        if shape.pool_size:
            _require_equal("box_roi_pool.output_size", spec.box_roi_pool.output_size, [shape.pool_size])
    if spec.has_rpn:
        _require_equal("rpn_head_shared", spec.rpn_head_shared, [shape.num_heads == 0])
        if shape.num_heads:
            _require_equal("the number of levels", len(spec.levels), [shape.num_heads])
        anchors = "the number of anchors per location (anchor_sizes of a level times aspect_ratios)"
        _require_equal(anchors, spec.num_anchors, [shape.num_anchors])


def _check_levels(spec: ModelSpec, shape: DetectorShape) -> None:
    # A top-down pyramid does not show where its levels begin.
    made = _possible_levels(shape, spec.levels[0] if spec.pyramid == "top_down" else None)
    allowed = {made[-1], made[-2]} if made[-1] > COARSEST_STAGE else {made[-1]}
    if spec.levels[-1] not in allowed:
        raise CheckpointError(
            f"its specification has levels {_span(spec.levels)}, but its tensors make {_span(made)}: "
            "state one entry of anchor_sizes for each level"
        )
    _require_equal("the finest of levels", spec.levels[0], [made[0]])


def _span(levels: Sequence[int]) -> str:
    return f"p{levels[0]}..p{levels[-1]}"


def _require_equal(name: str, given: object, found: Sequence[object]) -> None:
    if given not in found:
        shown = " or ".join(map(str, found))
        raise CheckpointError(
            f"{name} is {given} by its specification (JSON, options or defaults), but {shown} by its tensors"
        )


def _list_assumptions(spec: ModelSpec, stated: Mapping[str, Any]) -> list[str]:
    sentences = [] if "categories" in stated else [_describe_categories(spec)]
    values = spec.to_dict()
    idle = {*(() if spec.has_rpn else OF_THE_RPN), *(() if spec.has_box_head else OF_THE_BOX_HEAD)}
    for group, names in GROUPS.items():
        used = [name for name in names if name not in idle and not _is_stated(name, stated)]
        assumed = [f"{name} {json.dumps(values[name])}" for name in used]
        if assumed:
            sentences.append(f"assumed {group}: {', '.join(assumed)}")
    return sentences


def _is_stated(name: str, stated: Mapping[str, Any]) -> bool:
    if name == "box_roi_pool":  # its output_size is in the tensors
        pool = stated.get(name, {})
        return pool.get("kind") == "max" or {"sampling_ratio", "aligned"} <= set(pool)
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
