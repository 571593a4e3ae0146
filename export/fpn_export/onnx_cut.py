"""Cutting the two neural parts, trunk and box head, out of the end-to-end file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.utils import Extractor

from fpn_engine.errors import ModelError
from fpn_engine.spec import ModelSpec
from fpn_export.onnx_graph import tensor_info


def cut_trunk(model: ModelProto, spec: ModelSpec) -> ModelProto:
    """``image`` (N, 3, H, W) to the levels up to the last of RoIs, objectness and deltas, each transposed to NHWC.

    NHWC is what RoIAlign reads row by row and the order (y, x, anchor) of the selection; ONNX Runtime folds the
    transposes into the layout change that it makes anyway.
    """
    names: list[str] = []
    if spec.has_box_head:
        names += spec.level_names[: spec.levels.index(spec.roi_levels[-1]) + 1]
    if spec.has_rpn:
        names += [f"{kind}_{level}" for kind in ("objectness", "deltas") for level in spec.level_names]
    return cut_maps(model, names)


def cut_maps(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """``image`` to the maps ``names``, each transposed to NHWC and called ``NAME_nhwc``."""
    trunk = extract(model, ["image"], list(names))
    shapes = {output.name: output.type.tensor_type for output in trunk.graph.output}
    del trunk.graph.output[:]
    for name in names:
        trunk.graph.node.append(helper.make_node("Transpose", [name], [f"{name}_nhwc"], perm=[0, 2, 3, 1]))
        dims = [d.dim_param or d.dim_value for d in shapes[name].shape.dim]
        order = [dims[0], dims[2], dims[3], dims[1]] if len(dims) == 4 else ["n", "h", "w", "c"]
        trunk.graph.output.append(tensor_info(f"{name}_nhwc", TensorProto.FLOAT, order))
    return trunk


def cut_head(model: ModelProto, spec: ModelSpec) -> ModelProto:
    """``roi_rows`` (R, S * S * C), RoI features in NHWC order, to class_logits and box_deltas.

    Where the first layer is a Gemm on the flattened features, its weight's columns are put in that order, once;
    any other head gets a transpose in front.
    """
    head = extract(model, ["roi_features"], ["class_logits", "box_deltas"])
    size, channels = spec.box_roi_pool.output_size, spec.feature_channels
    rows = tensor_info("roi_rows", TensorProto.FLOAT, ("rois", size * size * channels))
    if not _permute_first_gemm(head, channels, size):
        _transpose_in_front(head, channels, size)
    del head.graph.input[:]
    head.graph.input.append(rows)
    return head


def extract(model: ModelProto, inputs: list[str], outputs: list[str]) -> ModelProto:
    """What leads from the tensors ``inputs`` to ``outputs``. Raises ModelError if one is not there."""
    produced = {name for node in model.graph.node for name in node.output} | {v.name for v in model.graph.input}
    for name in inputs + outputs:
        if name not in produced:
            raise ModelError(f"the ONNX file has no tensor {name}; export it again with this version")
    return Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(inputs, outputs)


def _permute_first_gemm(head: ModelProto, channels: int, size: int) -> bool:
    users = [node for node in head.graph.node if "roi_features" in node.input]
    if len(users) != 1 or users[0].op_type not in ("Flatten", "Reshape"):
        return False
    flatten = users[0]
    readers = [node for node in head.graph.node if flatten.output[0] in node.input]
    if len(readers) != 1:
        return False
    gemm = reader = readers[0]
    while gemm.op_type in ("QuantizeLinear", "DequantizeLinear"):  # of a quantised head
        following = [node for node in head.graph.node if gemm.output[0] in node.input]
        if len(following) != 1:
            return False
        gemm = following[0]
    weights = {tensor.name: tensor for tensor in head.graph.initializer}
    makers = {name: node for node in head.graph.node for name in node.output}
    if gemm.op_type != "Gemm":
        return False
    maker = makers.get(gemm.input[1])
    stored = maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else gemm.input[1]
    if stored not in weights:
        return False
    weight = weights[stored]
    transposed = any(a.name == "transB" and a.i == 1 for a in gemm.attribute)
    array = numpy_helper.to_array(weight)
    if not transposed or array.shape[1] != channels * size * size:
        return False
    nhwc = array.reshape(-1, channels, size, size).transpose(0, 2, 3, 1).reshape(array.shape)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(nhwc), weight.name))
    head.graph.node.remove(flatten)
    reader.input[0] = "roi_rows"
    return True


def _transpose_in_front(head: ModelProto, channels: int, size: int) -> None:
    shape = numpy_helper.from_array(np.array([-1, size, size, channels], dtype=np.int64), "roi_rows_shape")
    head.graph.initializer.append(shape)
    head.graph.node.insert(0, helper.make_node("Reshape", ["roi_rows", "roi_rows_shape"], ["roi_rows_nhwc"]))
    transpose = helper.make_node("Transpose", ["roi_rows_nhwc"], ["roi_features"], perm=[0, 3, 1, 2])
    head.graph.node.insert(1, transpose)
