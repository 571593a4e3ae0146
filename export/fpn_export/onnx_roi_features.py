"""RoI features as ONNX nodes (Lin et al. 2017, sec. 4.2, eq. 1): ``fpn_engine.pipeline.Pipeline.pool``."""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from fpn_engine.spec import ModelSpec
from fpn_export.onnx_boxes import ABOVE_EMPTY
from fpn_export.onnx_graph import OnnxGraph
from fpn_kernels.levels import LEVEL_EPS


def roi_maps(spec: ModelSpec) -> list[str]:
    """Names of the maps that RoIs are pooled from, finest first."""
    return [name for level, name in zip(spec.levels, spec.level_names, strict=True) if level in spec.roi_levels]


def mark_proposed(g: OnnxGraph) -> str:
    """(N * R,) bool: which slots of the RPN's ``proposals`` are not empty, by ``proposal_scores``."""
    return g.op("Greater", g.op("Reshape", "proposal_scores", g.int64(-1)), g.float32(ABOVE_EMPTY))


def mark_given(g: OnnxGraph) -> str:
    """(N * R,) bool: which slots of the input ``proposals`` are below ``proposal_counts`` and finite."""
    slot = _range(g, g.dim("proposals", 1))
    present = g.op("Less", slot, g.op("Unsqueeze", "proposal_counts", g.int64(1)))
    # v - v is 0 for what is finite and NaN for the rest, which no sum loses.
    difference = g.op("ReduceSum", g.op("Sub", "proposals", "proposals"), g.int64(2), keepdims=0)
    finite = g.op("Equal", difference, g.float32(0.0))
    return g.op("Reshape", g.op("And", present, finite), g.int64(-1))


def add_roi_features(g: OnnxGraph, spec: ModelSpec, real: str) -> None:
    """From ``proposals`` (N, R, 4) to ``roi_features`` (M, C, S, S) of the ``real`` ones, level by level.

    Also ``roi_slots`` (M,), the place of each in (N * R), and ``roi_images`` (M,), its image.
    """
    flat = g.op("Reshape", "proposals", g.int64(-1, 4))
    images = g.op("Div", _range(g, g.dim(flat, 0)), g.dim("proposals", 1))
    levels = _assign_levels(g, spec, flat)
    features, slots = [], []
    for level, name in zip(spec.roi_levels, roi_maps(spec), strict=True):
        here = g.op("And", real, g.op("Equal", levels, g.float32(float(level))))
        chosen = g.op("Squeeze", g.op("NonZero", here), g.int64(0))
        slots.append(chosen)
        boxes, image = g.op("Gather", flat, chosen, axis=0), g.op("Gather", images, chosen, axis=0)
        features.append(_pool(g, spec, name, boxes, image, 1.0 / 2**level))
    g.op("Concat", *features, axis=0, name="roi_features")
    g.op("Concat", *slots, axis=0, name="roi_slots")
    g.op("Gather", images, "roi_slots", axis=0, name="roi_images")


def _pool(g: OnnxGraph, spec: ModelSpec, features: str, boxes: str, images: str, scale: float) -> str:
    """(M, C, S, S) of (M, 4) boxes in pixels on one level."""
    pool = spec.box_roi_pool
    if pool.kind == "max":
        number = g.cast(g.op("Unsqueeze", images, g.int64(1)), TensorProto.FLOAT)
        rois = g.op("Concat", number, boxes, axis=1)
        return g.op("MaxRoiPool", features, rois, pooled_shape=[pool.output_size] * 2, spatial_scale=scale)
    return g.op(
        "RoiAlign",
        features,
        boxes,
        images,
        mode="avg",
        output_height=pool.output_size,
        output_width=pool.output_size,
        sampling_ratio=pool.sampling_ratio,
        spatial_scale=scale,
        coordinate_transformation_mode="half_pixel" if pool.aligned else "output_half_pixel",
    )


def _assign_levels(g: OnnxGraph, spec: ModelSpec, flat: str) -> str:
    """Eq. 1 as (N * R,) float32: floor(k0 + log2(sqrt(w h) / 224) + 1e-6), clamped."""
    low, high = g.ops("Split", flat, names=2, axis=-1, num_outputs=2)
    w, h = g.ops("Split", g.op("Sub", high, low), names=2, axis=-1, num_outputs=2)
    size = g.op("Squeeze", g.op("Sqrt", g.op("Mul", w, h)), g.int64(-1))
    octaves = g.op("Div", g.op("Log", g.op("Div", size, g.float32(spec.canonical_size))), g.float32(math.log(2)))
    level = g.op("Add", g.op("Add", octaves, g.float32(spec.canonical_level)), g.float32(LEVEL_EPS))
    return g.op("Clip", g.op("Floor", level), g.float32(spec.roi_levels[0]), g.float32(spec.roi_levels[-1]))


def _range(g: OnnxGraph, length: str) -> str:
    return g.op("Range", g.const(0, np.int64), g.op("Squeeze", length, g.int64(0)), g.const(1, np.int64))
