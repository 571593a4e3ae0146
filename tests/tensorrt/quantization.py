"""Q/DQ by rule of thumb: enough to prove that quantised graphs are taken, not a calibration."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.helper import tensor_dtype_to_np_dtype

LARGEST = {"int8": 127.0, "fp8": 448.0}
TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "uint8": TensorProto.UINT8}
RANGE = 8.0  # of every activation; the networks of the tests are normalised


def quantize(model: ModelProto, precision: str, *, int32_bias: bool = False, zero_point: int = 0) -> ModelProto:
    """Each Conv and Gemm that can be on quantised inputs and weights, these by output channel; uint8 to be refused."""
    model = ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    kind, largest = TYPES[precision], LARGEST.get(precision, 255.0)
    nodes, done = [], {}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm") and node.input[1] in weights and _takes(weights[node.input[1]], precision):
            name = node.input[0]
            if name not in done:
                done[name] = f"{name}.dq"
                scale = _put(graph, f"{name}.scale", np.float32(RANGE / largest))
                zero = _put(graph, f"{name}.zero", np.array(zero_point, tensor_dtype_to_np_dtype(kind)))
                nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}.q"], f"{name}.q"))
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", scale, zero], [done[name]]))
            node.input[0] = done[name]
            array = numpy_helper.to_array(weights[node.input[1]])
            steps = np.abs(array).reshape(len(array), -1).max(axis=1) / largest
            shaped = array / steps.reshape(-1, *[1] * (array.ndim - 1))
            whole = shaped if precision == "fp8" else np.round(shaped)
            names = [
                _put(graph, f"{node.input[1]}.q", whole.astype(tensor_dtype_to_np_dtype(kind))),
                _put(graph, f"{node.input[1]}.scale", steps.astype(np.float32)),
                _put(graph, f"{node.input[1]}.zeros", np.zeros(len(array), tensor_dtype_to_np_dtype(kind))),
            ]
            output = f"{node.input[1]}.dq"
            if output not in {each for made in nodes for each in made.output}:
                nodes.append(helper.make_node("DequantizeLinear", names, [output], axis=0))
            node.input[1] = output
            if int32_bias and len(node.input) > 2:
                bias = numpy_helper.to_array(weights[node.input[2]])
                unit = (steps * RANGE / largest).astype(np.float32)
                pair = [
                    _put(graph, f"{node.name}.bias.q", np.round(bias / unit).astype(np.int32)),
                    _put(graph, f"{node.name}.bias.scale", unit),
                ]
                node.input[2] = f"{node.name}.bias.dq"
                nodes.append(helper.make_node("DequantizeLinear", pair, [node.input[2]], axis=0))
        nodes.append(node)
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    return model


def _takes(weight: TensorProto, precision: str) -> bool:
    """TensorRT's fp8 layers have channels in sixteens and kernels of up to 32 cells."""
    wide = all(channels % 16 == 0 for channels in weight.dims[:2])
    return precision != "fp8" or (wide and math.prod(weight.dims[2:]) <= 32)


def _put(graph: GraphProto, name: str, array: ArrayLike) -> str:
    if name not in {tensor.name for tensor in graph.initializer}:
        graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name
