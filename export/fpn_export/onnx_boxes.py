"""Box arithmetic as ONNX nodes: decode, clip, size test and NMS, as ``fpn_kernels`` defines them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from fpn_export.onnx_graph import OnnxGraph
from fpn_kernels.decode import LOG_SIZE_LIMIT

EMPTY = -1.0  # score of an empty slot; real scores are 0..1
ABOVE_EMPTY = -0.5


def decode(g: OnnxGraph, anchors: str, deltas: str, weights: Sequence[float] | None = None) -> str:
    """(..., 4) anchors and deltas to boxes; the two broadcast against each other."""
    if weights is not None:
        deltas = g.op("Div", deltas, g.const(weights, np.float32))
    low, high = g.ops("Split", anchors, names=2, axis=-1, num_outputs=2)
    shift, log_scale = g.ops("Split", deltas, names=2, axis=-1, num_outputs=2)
    side = g.op("Sub", high, low)
    half = g.float32(0.5)
    centre = g.op("Add", g.op("Mul", shift, side), g.op("Add", low, g.op("Mul", half, side)))
    scale = g.op("Exp", g.op("Min", log_scale, g.float32(LOG_SIZE_LIMIT)))
    half_side = g.op("Mul", half, g.op("Mul", scale, side))
    return g.op("Concat", g.op("Sub", centre, half_side), g.op("Add", centre, half_side), axis=-1)


def clip(g: OnnxGraph, boxes: str, limits: str) -> str:
    """Clip (..., 4) boxes to 0 and (..., 4) limits w, h, w, h."""
    return g.op("Min", g.op("Max", boxes, g.float32(0.0)), limits)


def large_enough(g: OnnxGraph, boxes: str, min_size: float) -> str:
    """(..., 4) boxes to (...) bool: both sides at least ``min_size``."""
    low, high = g.ops("Split", boxes, names=2, axis=-1, num_outputs=2)
    enough = g.op("GreaterOrEqual", g.op("Sub", high, low), g.float32(min_size))
    # Not ReduceMin: ONNX Runtime leaves the shape of an empty tensor as it is (its issue 8146).
    wide, high = g.ops("Split", enough, names=2, axis=-1, num_outputs=2)
    return g.op("Squeeze", g.op("And", wide, high), g.int64(-1))


def blank(g: OnnxGraph, keep: str, boxes: str, scores: str) -> tuple[str, str]:
    """Empty the slots where (...) ``keep`` is false: box 0, score EMPTY."""
    kept = g.op("Where", g.op("Unsqueeze", keep, g.int64(-1)), boxes, g.float32(0.0))
    return kept, g.op("Where", keep, scores, g.float32(EMPTY))


def suppress(g: OnnxGraph, boxes: str, scores: str, iou_threshold: str) -> str:
    """Scores (B, K) with those that NMS drops set to EMPTY; each of the B rows is a group of its own."""
    picked = g.op(
        "NonMaxSuppression",
        boxes,
        g.op("Unsqueeze", scores, g.int64(1)),
        g.op("Squeeze", g.dim(scores, 1), g.int64(0)),
        iou_threshold,
        g.float32(ABOVE_EMPTY),
    )
    slots = g.op("Gather", picked, g.int64(0, 2), axis=1)
    ones = g.op("Expand", g.const([True]), g.dim(picked, 0))
    none = g.op("Expand", g.const([False]), g.op("Shape", scores))
    return g.op("Where", g.op("ScatterND", none, slots, ones), scores, g.float32(EMPTY))


def best(g: OnnxGraph, scores: str, k: str) -> tuple[str, str]:
    """The k highest of each row of (N, M) scores, at most M; ties by lower index."""
    top, index = g.ops("TopK", scores, g.op("Min", k, g.dim(scores, 1)), names=2, axis=1, largest=1, sorted=1)
    return top, index


def pick(g: OnnxGraph, values: str, index: str, name: str | None = None) -> str:
    """Rows ``index`` (N, D) of (N, M, ...) values."""
    return g.op("GatherND", values, g.op("Unsqueeze", index, g.int64(-1)), batch_dims=1, name=name)


def count_real(g: OnnxGraph, scores: str, name: str) -> str:
    """How many slots of each row are not empty: (N,) int64."""
    real = g.cast(g.op("Greater", scores, g.float32(ABOVE_EMPTY)), TensorProto.INT64)
    return g.op("ReduceSum", real, g.int64(1), keepdims=0, name=name)
