"""RoIAlign and detections as ONNX nodes (Lin et al. 2017, sec. 4.2): ``fpn_engine.pipeline.Pipeline.classify``."""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from fpn_engine.spec import ModelSpec
from fpn_export.onnx_boxes import ABOVE_EMPTY, best, blank, clip, count_real, decode, large_enough, pick, suppress
from fpn_export.onnx_graph import OnnxGraph
from fpn_kernels.roi_align import LEVEL_EPS


def add_roi_align(g: OnnxGraph, spec: ModelSpec) -> None:
    """From ``proposals`` to ``roi_features`` (M, C, S, S), real RoIs only, level by level.

    Also ``roi_slots`` (M,), the place of each in (N * R), and ``roi_images`` (M,), its image.
    """
    flat = g.op("Reshape", "proposals", g.int64(-1, 4))
    real = g.op("Greater", g.op("Reshape", "proposal_scores", g.int64(-1)), g.float32(ABOVE_EMPTY))
    images = g.op("Div", _range(g, g.dim(flat, 0)), g.dim("proposals", 1))
    levels = _assign_levels(g, spec, flat)
    pool = spec.box_roi_pool
    features, slots = [], []
    for level in spec.roi_levels:
        here = g.op("And", real, g.op("Equal", levels, g.float32(float(level))))
        chosen = g.op("Squeeze", g.op("NonZero", here), g.int64(0))
        slots.append(chosen)
        features.append(
            g.op(
                "RoiAlign",
                f"p{level}",
                g.op("Gather", flat, chosen, axis=0),
                g.op("Gather", images, chosen, axis=0),
                mode="avg",
                output_height=pool.output_size,
                output_width=pool.output_size,
                sampling_ratio=pool.sampling_ratio,
                spatial_scale=1.0 / 2**level,
                coordinate_transformation_mode="half_pixel" if pool.aligned else "output_half_pixel",
            )
        )
    g.op("Concat", *features, axis=0, name="roi_features")
    g.op("Concat", *slots, axis=0, name="roi_slots")
    g.op("Gather", images, "roi_slots", axis=0, name="roi_images")


def _assign_levels(g: OnnxGraph, spec: ModelSpec, flat: str) -> str:
    """Eq. 1 as (N * R,) float32: floor(k0 + log2(sqrt(w h) / 224) + 1e-6), clamped."""
    low, high = g.ops("Split", flat, names=2, axis=-1, num_outputs=2)
    w, h = g.ops("Split", g.op("Sub", high, low), names=2, axis=-1, num_outputs=2)
    size = g.op("Squeeze", g.op("Sqrt", g.op("Mul", w, h)), g.int64(-1))
    octaves = g.op("Div", g.op("Log", g.op("Div", size, g.float32(spec.canonical_size))), g.float32(math.log(2)))
    level = g.op("Add", g.op("Add", octaves, g.float32(spec.canonical_level)), g.float32(LEVEL_EPS))
    return g.op("Clip", g.op("Floor", level), g.float32(spec.roi_levels[0]), g.float32(spec.roi_levels[-1]))


def add_detections(g: OnnxGraph, spec: ModelSpec, limits: str) -> None:
    """From ``class_logits`` and ``box_deltas`` (M rows) to boxes, scores, labels and counts."""
    threshold = g.const(spec.box_score_thresh, np.float32, "box_score_thresh")
    iou = g.const(spec.box_nms_thresh, np.float32, "box_nms_thresh")
    limit = g.const([spec.box_detections_per_img], np.int64, "box_detections_per_img")
    classes = spec.num_classes - 1

    probabilities = g.op("Softmax", "class_logits", axis=1)
    scores = g.op("Slice", probabilities, g.int64(1), g.int64(spec.num_classes), g.int64(1))
    deltas = g.op("Reshape", "box_deltas", g.int64(-1, spec.num_classes, 4))
    deltas = g.op("Slice", deltas, g.int64(1), g.int64(spec.num_classes), g.int64(1))
    rois = g.op("Gather", g.op("Reshape", "proposals", g.int64(-1, 4)), "roi_slots", axis=0)
    boxes = decode(g, g.op("Unsqueeze", rois, g.int64(1)), deltas, spec.bbox_reg_weights)
    boxes = clip(g, boxes, g.op("Gather", limits, "roi_images", axis=0))
    keep = g.op("And", g.op("Greater", scores, threshold), large_enough(g, boxes, spec.box_min_size))
    boxes, scores = blank(g, keep, boxes, scores)

    # Back to one row per proposal slot, then class by class for the NMS: (N * K, R).
    n, r = g.dim("proposals", 0), g.dim("proposals", 1)
    rows = g.op("Concat", g.op("Mul", n, r), g.int64(classes), axis=0)
    where = g.op("Unsqueeze", "roi_slots", g.int64(1))
    scores = g.op("ScatterND", g.op("Expand", g.float32(-1.0), rows), where, scores)
    boxes = g.op("ScatterND", g.op("Expand", g.float32(0.0), _join(g, rows, 4)), where, boxes)
    by_roi = g.op("Concat", n, r, g.int64(classes), axis=0)
    scores = g.op("Transpose", g.op("Reshape", scores, by_roi), perm=[0, 2, 1])
    by_class = g.op("Transpose", g.op("Reshape", boxes, _join(g, by_roi, 4)), perm=[0, 2, 1, 3])
    groups = g.op("Concat", g.op("Mul", n, g.int64(classes)), r, axis=0)
    kept = suppress(g, g.op("Reshape", by_class, _join(g, groups, 4)), g.op("Reshape", scores, groups), iou)

    # Ties between classes go to the lower (proposal, class), so back to that order before the last TopK.
    kept = g.op("Transpose", g.op("Reshape", kept, g.op("Concat", n, g.int64(classes), r, axis=0)), perm=[0, 2, 1])
    kept = g.op("Reshape", kept, g.op("Concat", n, g.int64(-1), axis=0))
    top, index = best(g, kept, limit)
    count_real(g, top, "counts")
    real = g.op("Greater", top, g.float32(ABOVE_EMPTY))
    best_boxes = pick(g, g.op("Reshape", boxes, g.op("Concat", n, g.int64(-1, 4), axis=0)), index)
    labels = g.op("Add", g.op("Mod", index, g.int64(classes)), g.int64(1))
    missing = g.op("Sub", limit, g.dim(top, 1))
    _pad(g, g.op("Where", g.op("Unsqueeze", real, g.int64(-1)), best_boxes, g.float32(0.0)), missing, "boxes")
    _pad(g, g.op("Where", real, top, g.float32(0.0)), missing, "scores")
    _pad(g, g.op("Where", real, labels, g.const(0, np.int64)), missing, "labels")


def add_status(g: OnnxGraph, spec: ModelSpec) -> None:
    """``status`` (N,) int64: 1 where the image or the network's answer holds NaN or infinity, else 0.

    A sum carries either, and s - s is then NaN and otherwise 0.
    """
    maps = ["image", *(f"p{level}" for level in spec.roi_levels)]
    maps += [f"{kind}_p{level}" for kind in ("objectness", "deltas") for level in spec.levels]
    sums = [g.op("ReduceSum", value, g.int64(1, 2, 3), keepdims=0) for value in maps]
    # Back to one row per proposal slot first: a sum over no RoI at all would keep its shape in ONNX Runtime.
    n, slots = g.dim("proposals", 0), g.op("Mul", g.dim("proposals", 0), g.dim("proposals", 1))
    where = g.op("Unsqueeze", "roi_slots", g.int64(1))
    for value, width in (("class_logits", spec.num_classes), ("box_deltas", 4 * spec.num_classes)):
        rows = g.op("ScatterND", g.op("Expand", g.float32(0.0), _join(g, slots, width)), where, value)
        per_image = g.op("Reshape", rows, g.op("Concat", n, g.int64(-1), axis=0))
        sums.append(g.op("ReduceSum", per_image, g.int64(1), keepdims=0))
    total = g.op("Sum", *(g.op("Sub", value, value) for value in sums))
    g.op("Cast", g.op("IsNaN", total), to=TensorProto.INT64, name="status")


def _range(g: OnnxGraph, length: str) -> str:
    return g.op("Range", g.const(0, np.int64), g.op("Squeeze", length, g.int64(0)), g.const(1, np.int64))


def _join(g: OnnxGraph, shape: str, last: int) -> str:
    return g.op("Concat", shape, g.int64(last), axis=0)


def _pad(g: OnnxGraph, value: str, missing: str, name: str) -> None:
    """Pad axis 1 with zeros at its end and name the result."""
    g.op("Pad", value, g.op("Concat", g.int64(0), missing, axis=0), "", g.int64(1), name=name)
