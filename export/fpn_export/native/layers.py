"""ONNX operators that compute: convolutions, matrices, pooling, elementwise functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from fpn_engine.backends.native.ops import (
    Activate,
    Activation,
    Add,
    Affine,
    AveragePool,
    Concat,
    Conv,
    Flatten,
    GlobalAveragePool,
    Linear,
    MaxPool,
    Mul,
    Op,
)
from fpn_export.native.graph import Node
from fpn_export.native.lowering import Handler, Lowering, Value
from fpn_export.native.network import Array

FLOAT_MAX = float(np.finfo(np.float32).max)  # a bound that nothing reaches
HARD_SIGMOID = (0.2, 0.5)  # ONNX's defaults of alpha and beta


def lower_conv(at: Lowering, node: Node) -> None:
    x, weight = at.map(node), at.required(node, 1)
    if weight.ndim != 4:
        raise at.refuse(node, f"of {weight.ndim - 2} dimensions")
    bias = at.constant(node, 2)
    op = Conv(
        inputs=(x.name,),
        output=node.outputs[0],
        weight=at.layer_weight(node, lambda array: array.transpose(0, 2, 3, 1)),
        bias=None if bias is None else at.weight(node.input(2), bias),
        stride=_pair(node, "strides"),
        padding=_padding(at, node, weight.shape[2:]),
        dilation=_pair(node, "dilations"),
        groups=node.get("group", 1),
    )
    # A map of one cell stays one where the window is the cell.
    at.emit(op, node, x, channels=len(weight), single=x.single and weight.shape[2:] == (1, 1))


def lower_gemm(at: Lowering, node: Node) -> None:
    if node.get("transA", 0):
        raise at.refuse(node, "of a transposed matrix")
    bias = at.constant(node, 2)
    if bias is not None:
        bias = bias * np.float32(node.get("beta", 1.0))
    _add_linear(at, node, bool(node.get("transB", 0)), bias, node.get("alpha", 1.0))


def lower_matmul(at: Lowering, node: Node) -> None:
    _add_linear(at, node, False, None)


def _add_linear(at: Lowering, node: Node, transposed: bool, bias: Array | None, factor: float = 1.0) -> None:
    """Rows times a matrix times ``factor``; the columns of a flattened map are put in its order here.

    Args: transposed: whether the matrix is (O, F) as it is stored here.
    """
    x, given = at.value(node), at.required(node, 1)
    if x.layout != "rows" or given.ndim != 2:
        raise at.refuse(node, "on anything but a matrix and a constant one")
    out = given.shape[0 if transposed else 1]

    def arrange(array: Array) -> Array:
        rows = array if transposed else array.T
        return rows.reshape(out, *x.chw).transpose(0, 2, 3, 1).reshape(out, -1) if x.chw else rows

    if factor == 1.0 and transposed:
        weight = at.layer_weight(node, arrange)
    else:
        weight = at.weight(node.input(1), arrange(given) * np.float32(factor))
    if bias is not None:
        bias = np.broadcast_to(bias.reshape(-1), out)
    op = Linear(
        inputs=(x.name,),
        output=node.outputs[0],
        weight=weight,
        bias=None if bias is None else at.weight(node.input(2), bias),
    )
    at.emit(op, node, x, channels=out, chw=None)


def lower_batch_normalization(at: Lowering, node: Node) -> None:
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias, with the statistics of training."""
    if node.get("training_mode", 0):
        raise at.refuse(node, "in training")
    weight, bias, mean, variance = (at.required(node, i).astype(np.float64) for i in range(1, 5))
    scale = weight / np.sqrt(variance + node.get("epsilon", 1e-5))
    _add_affine(at, node, at.value(node), scale, bias - mean * scale)


def _add_affine(at: Lowering, node: Node, x: Value, scale: Array, shift: Array) -> None:
    if x.layout == "nhwc" or (x.chw and x.chw[1:] != (1, 1)):
        raise at.refuse(node, "on a flattened or transposed map")
    name = node.outputs[0]
    op = Affine(
        inputs=(x.name,),
        output=name,
        scale=at.weight(f"{name}.scale", np.broadcast_to(scale, x.channels)),
        shift=at.weight(f"{name}.shift", np.broadcast_to(shift, x.channels)),
    )
    at.emit(op, node, x)


def lower_pool(at: Lowering, node: Node) -> None:
    x = at.map(node)
    if node.get("ceil_mode", 0):
        raise at.refuse(node, "with ceil_mode")
    if len([name for name in node.outputs if name]) > 1 or node.get("storage_order", 0):
        raise at.refuse(node, "with the places of the maxima")
    kernel = _pair(node, "kernel_shape")
    shared: dict[str, Any] = {
        "inputs": (x.name,),
        "output": node.outputs[0],
        "kernel": kernel,
        "stride": _pair(node, "strides"),
        "padding": _padding(at, node, kernel),
    }
    dilation = _pair(node, "dilations")
    op: Op
    if node.kind == "MaxPool":
        op = MaxPool(**shared, dilation=dilation)
    else:
        counts = bool(node.get("count_include_pad", 0))
        top, left, bottom, right = shared["padding"]
        if dilation != (1, 1) or (not counts and (top, left) != (bottom, right)):
            raise at.refuse(node, "with dilations or uneven padding")
        op = AveragePool(**shared, count_padding=counts)
    at.emit(op, node, x, single=False)


def lower_global_average_pool(at: Lowering, node: Node) -> None:
    x = at.map(node)
    at.emit(GlobalAveragePool(inputs=(x.name,), output=node.outputs[0]), node, x, single=True)


def lower_reduce_mean(at: Lowering, node: Node) -> None:
    """The mean over H and W."""
    x = at.map(node)
    axes = node.attributes.get("axes") or at.required(node, 1).tolist()
    if sorted(axis % 4 for axis in axes) != [2, 3]:
        raise at.refuse(node, f"over the axes {axes}")
    name = node.outputs[0]
    if node.get("keepdims", 1):
        lower_global_average_pool(at, node)
        return
    at.emit(GlobalAveragePool(inputs=(x.name,), output=f"{name}:map"), node, x, single=True)
    at.emit(Flatten(inputs=(f"{name}:map",), output=name), node, x, layout="rows", single=False)


def lower_arithmetic(at: Lowering, node: Node) -> None:
    """Add, Sub, Mul and Div of two values, or of one and a constant per channel."""
    constants = [i for i in (0, 1) if at.is_constant(node, i)]
    if constants:
        _add_constant(at, node, constants[0])
        return
    if node.kind in ("Sub", "Div"):
        raise at.refuse(node, "of two computed values")
    a, b = at.value(node, 0), at.value(node, 1)
    if a.single and not b.single:
        a, b = b, a
    if (a.layout, a.chw) != (b.layout, b.chw) or a.channels != b.channels:
        raise at.refuse(node, "of values of different form")
    kind = Add if node.kind == "Add" else Mul
    at.emit(kind(inputs=(a.name, b.name), output=node.outputs[0]), node, a, single=a.single and b.single)


def _add_constant(at: Lowering, node: Node, index: int) -> None:
    x = at.value(node, 1 - index)
    number = _per_channel(at, node, at.required(node, index).astype(np.float64), x)
    one, zero = np.ones(1), np.zeros(1)
    if node.kind == "Add":
        _add_affine(at, node, x, one, number)
    elif node.kind == "Mul":
        _add_affine(at, node, x, number, zero)
    elif node.kind == "Sub":
        _add_affine(at, node, x, *((one, -number) if index == 1 else (-one, number)))
    elif index == 1:
        _add_affine(at, node, x, 1 / number, zero)
    else:
        raise at.refuse(node, "of a constant by a computed value")


def _per_channel(at: Lowering, node: Node, constant: Array, x: Value) -> Array:
    """A scalar, or one number for each channel."""
    if constant.size == 1:
        return constant.reshape(1)
    rank, axis = (4, 1) if x.is_map else (2, 1)
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if len(shape) != rank or constant.size != shape[axis] or shape[axis] != x.channels:
        raise at.refuse(node, "with a constant that is not one number per channel")
    return constant.reshape(-1)


def lower_concat(at: Lowering, node: Node) -> None:
    values = [at.value(node, i) for i in range(len(node.inputs))]
    first, rank = values[0], 2 if values[0].layout == "rows" else 4
    channel_axis = 3 if first.layout == "nhwc" else 1
    if node.get("axis", 1) % rank != channel_axis or any((v.layout, v.chw) != (first.layout, None) for v in values):
        raise at.refuse(node, "along anything but the channels")
    op = Concat(inputs=tuple(v.name for v in values), output=node.outputs[0])
    at.emit(op, node, first, channels=sum(v.channels for v in values), single=all(v.single for v in values))


def lower_activation(at: Lowering, node: Node) -> None:
    x, name = at.value(node), node.outputs[0]
    if node.kind == "Clip":
        activation = _clip(at, node)
    elif node.kind == "HardSigmoid":  # clip(alpha x + beta, 0, 1)
        alpha, beta = (node.get(key, default) for key, default in zip(("alpha", "beta"), HARD_SIGMOID, strict=True))
        _add_affine(at, node, x, np.array([alpha]), np.array([beta]))
        x, name = at.values[name], f"{name}:clip"
        activation = Activation(kind="clip", low=0.0, high=1.0)
    else:
        activation = Activation(kind={"Relu": "relu", "Sigmoid": "sigmoid", "HardSwish": "hardswish"}[node.kind])
    at.emit(Activate(inputs=(x.name,), output=name, activation=activation), node, x)


def _clip(at: Lowering, node: Node) -> Activation:
    bounds = []
    for index, (key, default) in enumerate((("min", -FLOAT_MAX), ("max", FLOAT_MAX)), start=1):
        given = at.constant(node, index)
        bound = float(node.get(key, default)) if given is None else float(given.reshape(()))
        bounds.append(min(max(bound, -FLOAT_MAX), FLOAT_MAX))
    return Activation(kind="clip", low=bounds[0], high=bounds[1])


def _pair(node: Node, name: str) -> tuple[int, int]:
    first, second = node.get(name, (1, 1))
    return int(first), int(second)


def _padding(at: Lowering, node: Node, kernel: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Top, left, bottom, right."""
    automatic = node.get("auto_pad", "NOTSET")
    if automatic in ("NOTSET", "VALID"):
        top, left, bottom, right = node.get("pads", (0, 0, 0, 0)) if automatic == "NOTSET" else (0, 0, 0, 0)
        return int(top), int(left), int(bottom), int(right)
    if _pair(node, "strides") != (1, 1):
        raise at.refuse(node, f"with auto_pad {automatic} and a stride")
    total = [d * (k - 1) for d, k in zip(_pair(node, "dilations"), kernel, strict=True)]
    less, more = ([t // 2 for t in total], [t - t // 2 for t in total])
    first, last = (less, more) if automatic == "SAME_UPPER" else (more, less)
    return first[0], first[1], last[0], last[1]


LAYERS: dict[str, Handler] = {
    "Add": lower_arithmetic,
    "AveragePool": lower_pool,
    "BatchNormalization": lower_batch_normalization,
    "Clip": lower_activation,
    "Concat": lower_concat,
    "Conv": lower_conv,
    "Div": lower_arithmetic,
    "Gemm": lower_gemm,
    "GlobalAveragePool": lower_global_average_pool,
    "HardSigmoid": lower_activation,
    "HardSwish": lower_activation,
    "MatMul": lower_matmul,
    "MaxPool": lower_pool,
    "Mul": lower_arithmetic,
    "ReduceMean": lower_reduce_mean,
    "Relu": lower_activation,
    "Sigmoid": lower_activation,
    "Sub": lower_arithmetic,
}
