"""What a program costs: products, and the bytes that any implementation of its operations moves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.ops import AveragePool, Conv, GlobalAveragePool, Linear, MaxPool, Op
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.quantized import QuantizedConv, QuantizedLinear
from fpn_engine.backends.native.shapes import Shape, Shapes, infer_shapes

LAYERS = (Conv, Linear, QuantizedConv, QuantizedLinear)
READ_AND_WRITTEN = (*LAYERS, MaxPool, AveragePool, GlobalAveragePool)


class Cost(NamedTuple):
    """Of one operation: multiply-adds, and bytes of weights and activations that are read or written."""

    macs: int
    moved: int


def count_costs(program: Program, shape: Shape, weights: Shapes) -> Iterator[Cost]:
    """Of each operation in turn, for an input of ``shape``.

    Convolutions, fully connected layers and pools read their inputs and write their output once, each weight is read
    once. Of other operations the second input counts alone, since the rest could be done in passing.

    Args: weights: shapes of the stored tensors.
    Raises: ValueError for a shape that the program does not fit.
    """
    shapes = infer_shapes(program.ops, {program.input: shape}, weights)
    dtypes, seen = program.dtypes(), set[str]()
    sizes = {name: math.prod(sides) * DTYPES[dtypes[name]].itemsize for name, sides in shapes.items()}
    for op in program.ops:
        tensors = {name: kind for name, kind in op.tensor_dtypes(dtypes[op.inputs[0]]).items() if name not in seen}
        moved = sum(DTYPES[kind].itemsize * math.prod(weights[name]) for name, kind in tensors.items())
        seen.update(op.weights)
        if isinstance(op, READ_AND_WRITTEN):
            moved += sum(sizes[name] for name in (*op.inputs, op.output))
        else:
            moved += sum(sizes[name] for name in op.inputs[1:])
        yield Cost(_count_macs(op, shapes, weights), moved)


def _count_macs(op: Op, shapes: Shapes, weights: Shapes) -> int:
    if isinstance(op, LAYERS):  # weights are (O, kH, kW, C / groups) and (O, F)
        return math.prod(shapes[op.output]) * math.prod(weights[op.weight][1:])
    return 0
