"""What TensorRT's ONNX parser documents: operators, number types and restrictions, for those that networks are made of.

Source: docs/operators.md of github.com/onnx/onnx-tensorrt, release 10.15; TensorRT 11 takes the same opsets.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

OPSETS = range(9, 25)
_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ANY = _NUMBERS | {"BOOL"}
QUANTIZED = frozenset({"INT8", "FLOAT8E4M3FN"})
DOCUMENTED: dict[str, frozenset[str]] = {
    "Abs": _NUMBERS,
    "Add": _NUMBERS,
    "AveragePool": _FLOATS,
    "BatchNormalization": _FLOATS,
    "Cast": _ANY | {"UINT8"},
    "Clip": _FLOATS,
    "Concat": _ANY,
    "Constant": _ANY | {"FLOAT8E4M3FN"},
    "ConstantOfShape": _ANY | {"FLOAT8E4M3FN"},
    "Conv": _FLOATS,
    "ConvTranspose": _FLOATS,
    "DequantizeLinear": QUANTIZED,
    "Div": _NUMBERS,
    "Exp": _FLOATS,
    "Expand": _ANY,
    "Flatten": _ANY,
    "Gather": _ANY,
    "Gemm": _FLOATS,
    "GlobalAveragePool": _FLOATS,
    "GroupNormalization": _FLOATS,
    "HardSigmoid": _FLOATS,
    "HardSwish": _FLOATS,
    "Identity": _ANY,
    "LeakyRelu": _FLOATS,
    "MatMul": _FLOATS,
    "MaxPool": _FLOATS,
    "Mul": _NUMBERS,
    "Pad": _NUMBERS,
    "Pow": _NUMBERS,
    "QuantizeLinear": _FLOATS,
    "ReduceMean": _NUMBERS,
    "Relu": _NUMBERS,
    "Reshape": _ANY,
    "Resize": _FLOATS,
    "Shape": _ANY,
    "Sigmoid": _FLOATS,
    "Slice": _ANY,
    "Softmax": _FLOATS,
    "Split": _ANY,
    "Sqrt": _FLOATS,
    "Squeeze": _ANY,
    "Sub": _NUMBERS,
    "Transpose": _ANY,
    "Unsqueeze": _ANY,
}
RESIZE = {
    "coordinate_transformation_mode": {
        "half_pixel",
        "pytorch_half_pixel",
        "tf_half_pixel_for_nn",
        "asymmetric",
        "align_corners",
    },
    "mode": {"nearest", "linear"},
    "nearest_mode": {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"},
    "keep_aspect_ratio_policy": {"stretch"},
    "antialias": {0},
}


def find_undocumented(model: ModelProto) -> list[str]:
    """Everything in a model that the parser does not document, one line each."""
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    found = [] if opset in OPSETS else [f"opset {opset}"]
    found += [f"function {function.name}" for function in model.functions]
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.value_info, *graph.output]}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    # Of the data that a node works on; what else it takes (sizes, scales, axes, zero points) is of types of its own.
    for node in graph.node:
        found += [f"{node.op_type} {node.name}: {reason}" for reason in _reasons(node, types)]
    return found


def _reasons(node: NodeProto, types: dict[str, int]) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx") or node.op_type not in DOCUMENTED:
        yield "no such operator"
        return
    kinds = {TensorProto.DataType.Name(types[name]) for name in [*node.input[:1], *node.output[:1]]}
    allowed = DOCUMENTED[node.op_type]
    if node.op_type == "Shape":
        allowed |= {"INT64"}
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        allowed |= QUANTIZED | _FLOATS
    if kinds - allowed:
        yield f"types {sorted(kinds - allowed)}"
    if node.op_type in ("Conv", "Gemm", "MatMul", "Add", "Concat"):
        mixed = {types[name] for name in node.input if name}
        if len(mixed) > 1:
            yield f"mixed types {sorted(map(TensorProto.DataType.Name, mixed))}"
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if any(isinstance(value, onnx.GraphProto) for value in attributes.values()):
        yield "a graph inside"
    if node.op_type == "MaxPool" and (len(node.output) > 1 or set(attributes.get("dilations", [1])) != {1}):
        yield "indices or dilations"
    if node.op_type == "Resize":
        for name, known in RESIZE.items():
            value = attributes.get(name)
            if value is not None and (value.decode() if isinstance(value, bytes) else value) not in known:
                yield f"{name} {value}"
