"""Quantised graphs: what stands between QuantizeLinear and DequantizeLinear as TensorRT takes it."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from fpn_engine.errors import ModelError

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
QUANTIZED_TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def is_quantized(model: ModelProto) -> bool:
    return any(node.op_type in (QUANTIZE, DEQUANTIZE) for node in model.graph.node)


def quantized_precision(model: ModelProto) -> str | None:
    """What the first pair of a model quantises to: "int8", "fp8", the name of another type, or None without pairs."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    precisions = {int(kind): name for name, kind in QUANTIZED_TYPES.items()}
    for node in model.graph.node:
        if node.op_type == QUANTIZE:
            zero = weights.get(node.input[2]) if len(node.input) > 2 else None
            kind = int(zero.data_type if zero is not None else TensorProto.UINT8)  # ONNX's default
            return precisions.get(kind) or TensorProto.DataType.Name(kind).lower()
    return None


def not_quantized(precision: str) -> str:
    """What to say of a float model that is to be built in ``precision``."""
    return (
        f"the model is not quantised, which --precision {precision} needs; "
        "quantise it first with: fpn-engine quantize model.onnx --images DIR"
    )


def check_quantized(network: ModelProto, precision: str) -> ModelProto:
    """A copy with only ``precision`` and float32 in it; a bias kept as int32 is float32 again.

    ONNX Runtime wants biases as int32, TensorRT has no such type.

    Raises: ModelError if nothing is quantised, or with another type or zero point than TensorRT takes.
    """
    if not is_quantized(network):
        raise ModelError(not_quantized(precision))
    model = ModelProto()
    model.CopyFrom(network)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == DEQUANTIZE]:
        if (bias := weights.get(node.input[0])) is not None and bias.data_type == TensorProto.INT32:
            weights[node.output[0]] = _dequantized(node, weights)
            model.graph.node.remove(node)
    for node in model.graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            _check_node(node, weights, precision)
    used = {name for node in model.graph.node for name in node.input}
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensor for name, tensor in weights.items() if name in used)
    return model


def _check_node(node: NodeProto, weights: dict[str, TensorProto], precision: str) -> None:
    again = "quantise it again with: fpn-engine quantize"
    if len(node.input) < 3 or node.input[2] not in weights:
        raise ModelError(f"{node.name or node.op_type} has no constant zero point; {again}")
    zero = weights[node.input[2]]
    if zero.data_type != QUANTIZED_TYPES[precision]:
        found = TensorProto.DataType.Name(zero.data_type).lower()
        raise ModelError(f"{node.name or node.op_type} quantises to {found}, not to {precision}; {again}")
    if np.any(numpy_helper.to_array(zero).astype(np.float32)):
        raise ModelError(f"{node.name or node.op_type} has a zero point that is not 0, as TensorRT needs it; {again}")


def _dequantized(node: NodeProto, weights: dict[str, TensorProto]) -> TensorProto:
    """(x - zero point) * scale of a one-dimensional constant, with one scale or one for each number."""
    values = numpy_helper.to_array(weights[node.input[0]]).astype(np.float64)
    scale = numpy_helper.to_array(weights[node.input[1]]).astype(np.float64)
    zero = numpy_helper.to_array(weights[node.input[2]]) if len(node.input) > 2 and node.input[2] else 0
    return numpy_helper.from_array(((values - zero) * scale).astype(np.float32), node.output[0])
