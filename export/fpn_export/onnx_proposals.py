"""Region proposals as ONNX nodes (Lin et al. 2017, sec. 4.1): ``fpn_engine.pipeline.Pipeline.propose``."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from fpn_engine.spec import ModelSpec
from fpn_export.onnx_boxes import best, blank, clip, decode, large_enough, pick, suppress
from fpn_export.onnx_graph import OnnxGraph
from fpn_kernels import make_base_anchors


def box_limits(g: OnnxGraph, image_sizes: str) -> str:
    """(N, 2) int64 heights and widths to (N, 1, 4) float32 w, h, w, h."""
    sizes = g.cast(image_sizes, TensorProto.FLOAT)
    return g.op("Unsqueeze", g.op("Gather", sizes, g.int64(1, 0, 1, 0), axis=1), g.int64(1))


def add_proposals(g: OnnxGraph, spec: ModelSpec, limits: str) -> None:
    """From objectness_p2.. and deltas_p2.. to ``proposals`` (N, R, 4) and ``proposal_scores`` (N, R)."""
    iou = g.const(spec.rpn_nms_thresh, np.float32, "rpn_nms_thresh")
    threshold = g.const(spec.rpn_score_thresh, np.float32, "rpn_score_thresh")
    boxes, scores = [], []
    for level, sizes in zip(spec.level_names, spec.anchor_sizes, strict=True):
        base = make_base_anchors(sizes, spec.aspect_ratios).numpy()
        level_boxes, level_scores = _decode_level(g, spec, level, base, limits, threshold)
        boxes.append(level_boxes)
        scores.append(suppress(g, level_boxes, level_scores, iou))
    all_boxes, all_scores = g.op("Concat", *boxes, axis=1), g.op("Concat", *scores, axis=1)
    top, index = best(g, all_scores, g.int64(spec.rpn_post_nms_top_n_test))
    pick(g, all_boxes, index, name="proposals")
    g.op("Identity", top, name="proposal_scores")


def _decode_level(
    g: OnnxGraph, spec: ModelSpec, level: str, base: np.ndarray, limits: str, threshold: str
) -> tuple[str, str]:
    """The level's best anchors as clipped boxes (N, k, 4) and scores (N, k), EMPTY where dropped."""
    objectness, deltas = f"objectness_{level}", f"deltas_{level}"
    rows = g.op("Reshape", g.op("Transpose", objectness, perm=[0, 2, 3, 1]), g.int64(0, -1))
    delta_rows = g.op("Reshape", g.op("Transpose", deltas, perm=[0, 2, 3, 1]), g.int64(0, -1, 4))
    logits, index = best(g, rows, g.int64(spec.rpn_pre_nms_top_n_test))

    per_cell = g.int64(len(base))
    anchor, cell = g.op("Mod", index, per_cell), g.op("Div", index, per_cell)
    grid_w, grid_h = g.dim(objectness, 3), g.dim(objectness, 2)
    x = g.op("Mul", g.op("Mod", cell, grid_w), g.op("Div", g.dim("image", 3), grid_w))
    y = g.op("Mul", g.op("Div", cell, grid_w), g.op("Div", g.dim("image", 2), grid_h))
    corner = g.op("Concat", *(g.op("Unsqueeze", v, g.int64(2)) for v in (x, y, x, y)), axis=2)
    anchors = g.op("Add", g.cast(corner, TensorProto.FLOAT), g.op("Gather", g.const(base), anchor, axis=0))

    boxes = clip(g, decode(g, anchors, pick(g, delta_rows, index)), limits)
    scores = g.op("Sigmoid", logits)
    keep = g.op("And", large_enough(g, boxes, spec.rpn_min_size), g.op("GreaterOrEqual", scores, threshold))
    return blank(g, keep, boxes, scores)
