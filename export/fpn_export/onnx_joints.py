"""Cutting the joints out of the end-to-end file: what lies between trunk and box head, and what lies behind them.

With trunk and head they are the whole detector for ONNX Runtime alone, without a weight twice in the plan.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fpn_engine.spec import ModelSpec
from fpn_export.onnx_cut import extract
from fpn_export.onnx_export import OVERRIDABLE
from fpn_export.onnx_graph import tensor_info
from fpn_export.onnx_roi_features import roi_maps

GIVEN = ["proposals", "proposal_counts"]
ANSWERS = ["class_logits", "box_deltas"]
OUTPUTS = ["boxes", "scores", "labels", "counts", "status"]


def cut_joints(model: ModelProto, spec: ModelSpec) -> dict[str, ModelProto]:
    """The joints by name, their tensors named as in the file, so that each takes by name what those before it gave.

    "rois": ``image``, ``image_sizes``, the trunk's maps as NHWC and, for a Fast R-CNN, ``proposals`` and
    ``proposal_counts``, to ``roi_rows`` (M, S * S * C), which the head takes, and to what is known of these RoIs.
    "detections": that, the head's answers and the thresholds, which are optional, to the outputs of the whole file.
    An RPN alone has "detections" only, from the maps.
    """
    thresholds = [value.name for value in model.graph.input if value.name in OVERRIDABLE]
    of_boxes = [name for name in thresholds if not name.startswith("rpn_")]
    objectness = [f"{kind}_{level}" for kind in ("objectness", "deltas") for level in spec.level_names]
    if not spec.has_box_head:
        return {"detections": _read_nhwc(extract(model, ["image", "image_sizes", *objectness, *thresholds], OUTPUTS))}
    proposed = ["proposals", "proposal_scores"] if spec.has_rpn else []
    known = ["roi_slots", "roi_images", "map_check"]
    maps = [*roi_maps(spec), *objectness] if spec.has_rpn else [*roi_maps(spec), *GIVEN]
    rois = extract(model, ["image", "image_sizes", *maps], ["roi_features", *known, *proposed])
    detections = extract(model, [*ANSWERS, "image_sizes", "proposals", *known, *of_boxes], OUTPUTS)
    return {"rois": _write_rows(_read_nhwc(rois), spec), "detections": detections}


def _read_nhwc(joint: ModelProto) -> ModelProto:
    """Have the maps come as ``NAME_nhwc``, as the trunk gives them; ONNX Runtime drops what two transposes undo."""
    graph = joint.graph
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name == "image" or len(dims) != 4:
            continue
        name = value.name
        n, c, h, w = (dim.dim_param or dim.dim_value for dim in dims)
        value.CopyFrom(tensor_info(f"{name}_nhwc", TensorProto.FLOAT, (n, h, w, c)))
        graph.node.insert(0, helper.make_node("Transpose", [value.name], [name], perm=[0, 3, 1, 2]))
    return joint


def _write_rows(joint: ModelProto, spec: ModelSpec) -> ModelProto:
    """Have ``roi_features`` (M, C, S, S) leave as ``roi_rows`` (M, S * S * C)."""
    graph = joint.graph
    length = spec.box_roi_pool.output_size**2 * spec.feature_channels
    # 0 keeps the number of RoIs, which -1 could not say where there are none.
    graph.initializer.append(numpy_helper.from_array(np.array([0, length], dtype=np.int64), "roi_rows_shape"))
    graph.node.append(helper.make_node("Transpose", ["roi_features"], ["roi_features_nhwc"], perm=[0, 2, 3, 1]))
    graph.node.append(helper.make_node("Reshape", ["roi_features_nhwc", "roi_rows_shape"], ["roi_rows"]))
    (features,) = (value for value in graph.output if value.name == "roi_features")
    features.CopyFrom(tensor_info("roi_rows", TensorProto.FLOAT, ("rois", length)))
    return joint
