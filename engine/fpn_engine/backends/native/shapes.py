"""Shapes and number types of every value of a program, from those of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch

from fpn_engine.backends.native.ops import (
    UNIT,
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
    Padding,
    Pair,
    Slice,
    Unflatten,
    Upsample,
    WindowScore,
)
from fpn_engine.backends.native.quantized import Quantize, QuantizedConv, QuantizedLinear

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def infer_shapes(ops: Sequence[Op], given: Shapes, weights: Shapes) -> dict[str, Shape]:
    """The shape of every value, (N, H, W, C) or (R, F).

    Args:
        given: of the program's input. weights: of the stored tensors.
    Raises: ValueError, naming the value, for operations and tensors that do not fit together.
    """
    shapes = dict(given)
    for op in ops:
        try:
            shape = infer_shape(op, [shapes[name] for name in op.inputs], weights)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{op.KIND} {op.output}: {error}") from None
        if min(shape) < 1:
            raise ValueError(f"{op.KIND} {op.output} would have the shape {shape}")
        shapes[op.output] = shape
    return shapes


def infer_dtypes(ops: Sequence[Op], given: Mapping[str, str]) -> dict[str, str]:
    """The number type of every value. Raises ValueError where inputs of one operation differ or are not its own."""
    dtypes = dict(given)
    for op in ops:
        kinds = {dtypes[name] for name in op.inputs}
        if len(kinds) != 1:
            raise ValueError(f"{op.KIND} {op.output} mixes {' and '.join(sorted(kinds))}")
        kind = kinds.pop()
        if kind not in op.TAKES:
            raise ValueError(f"{op.KIND} {op.output} does not take {kind}")
        dtypes[op.output] = op.result_dtype or kind
    return dtypes


def infer_steps(ops: Sequence[Op]) -> dict[str, float]:
    """The step of every value of 8 bits: its own, or that of what it was moved from."""
    steps: dict[str, float] = {}
    for op in ops:
        if isinstance(op, (Quantize, QuantizedConv, QuantizedLinear)):
            steps[op.output] = op.step
        elif op.inputs[0] in steps and op.result_dtype is None:
            steps[op.output] = steps[op.inputs[0]]
    return steps


@singledispatch
def infer_shape(op: Op, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    """The shape of one operation's output; of those that keep their input's shape, that."""
    return shapes[0]


@infer_shape.register(Conv)
@infer_shape.register(QuantizedConv)
def _conv(op: Conv | QuantizedConv, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    n, h, w, c = _map(shapes[0])
    out, kernel_h, kernel_w, per_group = weights[op.weight]
    _require(c == per_group * op.groups and out % op.groups == 0, f"{c} channels on a weight {weights[op.weight]}")
    _fit_channels(op, out, weights)
    sides = _windows((h, w), (kernel_h, kernel_w), op.stride, op.padding, op.dilation)
    shape = (n, *sides, out)
    if len(shapes) == 2:
        _fit_upsampled(shape, shapes[1], op.upsample)
    return shape


@infer_shape.register(Linear)
@infer_shape.register(QuantizedLinear)
def _linear(op: Linear | QuantizedLinear, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    rows, width = _rows(shapes[0])
    out, columns = weights[op.weight]
    _require(width == columns, f"rows of {width} on a weight {weights[op.weight]}")
    _fit_channels(op, out, weights)
    return rows, out


@infer_shape.register
def _window_score(op: WindowScore, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    out, kernel_h, kernel_w, channels = weights[op.weight]
    _require(kernel_h == kernel_w and kernel_h % 2 == 1, f"a weight {weights[op.weight]}")
    n, *_ = _map(shapes[0])
    for shape in shapes:
        images, _, _, c = _map(shape)
        _require((images, c) == (n, channels), f"{shape} on a weight {weights[op.weight]}")
    for name, length in ((op.bias, out), (op.scale, out), (op.shift, 1)):
        _fit_vector(name, length, weights)
    return n, sum(h * w for _, h, w, _ in shapes), 1, 1


@infer_shape.register(MaxPool)
@infer_shape.register(AveragePool)
def _pool(op: MaxPool | AveragePool, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    n, h, w, c = _map(shapes[0])
    dilation = op.dilation if isinstance(op, MaxPool) else UNIT
    return (n, *_windows((h, w), op.kernel, op.stride, op.padding, dilation), c)


@infer_shape.register
def _global_average_pool(op: GlobalAveragePool, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    n, _, _, c = _map(shapes[0])
    return n, 1, 1, c


@infer_shape.register
def _add(op: Add, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    if op.upsample == UNIT:
        _fit_factor(*shapes)
    else:
        _fit_upsampled(shapes[0], shapes[1], op.upsample)
    return shapes[0]


@infer_shape.register
def _mul(op: Mul, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    _fit_factor(*shapes)
    return shapes[0]


@infer_shape.register
def _affine(op: Affine, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    for name in op.weights:
        _fit_vector(name, shapes[0][-1], weights)
    return shapes[0]


@infer_shape.register
def _upsample(op: Upsample, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    n, h, w, c = _map(shapes[0])
    return n, h * op.factor[0], w * op.factor[1], c


@infer_shape.register
def _concat(op: Concat, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    first = shapes[0]
    _require(all(shape[:-1] == first[:-1] for shape in shapes), f"of {' and '.join(map(str, shapes))}")
    return (*first[:-1], sum(shape[-1] for shape in shapes))


@infer_shape.register
def _slice(op: Slice, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    _require(0 <= op.start < op.stop <= shapes[0][-1], f"{op.start} to {op.stop} of {shapes[0][-1]} channels")
    return (*shapes[0][:-1], op.stop - op.start)


@infer_shape.register
def _flatten(op: Flatten, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    n, h, w, c = _map(shapes[0])
    return n, h * w * c


@infer_shape.register
def _unflatten(op: Unflatten, shapes: Sequence[Shape], weights: Shapes) -> Shape:
    rows, width = _rows(shapes[0])
    cells = op.height * op.width
    _require(width % cells == 0, f"rows of {width} as {op.height} x {op.width} cells")
    return rows, op.height, op.width, width // cells


def _windows(sides: Pair, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> Pair:
    """Sides of what windows make of an image."""
    top, left, bottom, right = padding
    h = (sides[0] + top + bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    w = (sides[1] + left + right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    return h, w


def _map(shape: Shape) -> Shape:
    _require(len(shape) == 4, f"a map (N, H, W, C) is needed, not {shape}")
    return shape


def _rows(shape: Shape) -> Shape:
    _require(len(shape) == 2, f"rows (R, F) are needed, not {shape}")
    return shape


def _fit_channels(op: Op, channels: int, weights: Shapes) -> None:
    """Every tensor beside the weight has a number for each output channel."""
    for name in op.weights[1:]:
        _fit_vector(name, channels, weights)


def _fit_vector(name: str | None, length: int, weights: Shapes) -> None:
    if name is not None:
        _require(weights[name] == (length,), f"{name} has the shape {weights[name]}, not ({length},)")


def _fit_upsampled(shape: Shape, coarse: Shape, scale: Pair) -> None:
    n, h, w, c = _map(coarse)
    _require((n, h * scale[0], w * scale[1], c) == shape, f"{coarse} upsampled by {scale} is added to {shape}")


def _fit_factor(shape: Shape, other: Shape) -> None:
    per_channel = len(shape) == 4 and other == (shape[0], 1, 1, shape[3])
    _require(other == shape or per_channel, f"{other} and {shape} do not fit together")


def _require(ok: bool, problem: str) -> None:
    if not ok:
        raise ValueError(problem)
