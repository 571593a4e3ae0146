"""Detections and their status as ONNX nodes (Lin et al. 2017, sec. 4): what ``fpn_engine.pipeline`` ends with."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from fpn_engine.spec import ModelSpec
from fpn_export.onnx_boxes import ABOVE_EMPTY, best, blank, clip, count_real, decode, large_enough, pick, suppress
from fpn_export.onnx_graph import OnnxGraph
from fpn_export.onnx_roi_features import roi_maps


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
    labels = g.op("Add", g.op("Mod", index, g.int64(classes)), g.int64(1))
    best_boxes = pick(g, g.op("Reshape", boxes, g.op("Concat", n, g.int64(-1, 4), axis=0)), index)
    _add_outputs(g, best_boxes, top, labels, limit)


def add_proposal_detections(g: OnnxGraph, spec: ModelSpec) -> None:
    """From ``proposals`` and ``proposal_scores`` to boxes, scores, labels and counts: an RPN alone (sec. 4.1)."""
    limit = g.const([spec.box_detections_per_img], np.int64, "box_detections_per_img")
    top, index = best(g, "proposal_scores", limit)
    _add_outputs(g, pick(g, "proposals", index), top, g.int64(1), limit)


def _add_outputs(g: OnnxGraph, boxes: str, scores: str, labels: str, limit: str) -> None:
    """The best (N, K) slots as outputs of length ``limit``, zeros where empty and behind the last."""
    count_real(g, scores, "counts")
    real = g.op("Greater", scores, g.float32(ABOVE_EMPTY))
    missing = g.op("Sub", limit, g.dim(scores, 1))
    _pad(g, g.op("Where", g.op("Unsqueeze", real, g.int64(-1)), boxes, g.float32(0.0)), missing, "boxes")
    _pad(g, g.op("Where", real, scores, g.float32(0.0)), missing, "scores")
    _pad(g, g.op("Where", real, labels, g.const(0, np.int64)), missing, "labels")


def add_status(g: OnnxGraph, spec: ModelSpec) -> None:
    """``status`` (N,) int64: 1 where the image or the network's answer holds NaN or infinity, else 0.

    A sum carries either, and s - s is then NaN and otherwise 0; so is a sum of finite numbers that overflows, at which
    only ``find_nonfinite`` looks again. ``map_check`` (N,) float32 is that of image and maps.
    """
    maps = ["image"]
    if spec.has_box_head:
        maps += roi_maps(spec)
    if spec.has_rpn:
        maps += [f"{kind}_{level}" for kind in ("objectness", "deltas") for level in spec.level_names]
    checks = [_check(g, g.op("ReduceSum", value, g.int64(1, 2, 3), keepdims=0)) for value in maps]
    total = g.op("Sum", *checks, name="map_check")
    if spec.has_box_head:
        # Back to one row per proposal slot first: a sum over no RoI at all would keep its shape in ONNX Runtime.
        n, slots = g.dim("proposals", 0), g.op("Mul", g.dim("proposals", 0), g.dim("proposals", 1))
        where = g.op("Unsqueeze", "roi_slots", g.int64(1))
        for value, width in (("class_logits", spec.num_classes), ("box_deltas", 4 * spec.num_classes)):
            rows = g.op("ScatterND", g.op("Expand", g.float32(0.0), _join(g, slots, width)), where, value)
            per_image = g.op("Reshape", rows, g.op("Concat", n, g.int64(-1), axis=0))
            total = g.op("Add", total, _check(g, g.op("ReduceSum", per_image, g.int64(1), keepdims=0)))
    g.op("Cast", g.op("IsNaN", total), to=TensorProto.INT64, name="status")


def _check(g: OnnxGraph, value: str) -> str:
    """0 where ``value`` is finite, else NaN."""
    return g.op("Sub", value, value)


def _join(g: OnnxGraph, shape: str, last: int) -> str:
    return g.op("Concat", shape, g.int64(last), axis=0)


def _pad(g: OnnxGraph, value: str, missing: str, name: str) -> None:
    """Pad axis 1 with zeros at its end and name the result."""
    g.op("Pad", value, g.op("Concat", g.int64(0), missing, axis=0), "", g.int64(1), name=name)
