"""A network on its way from ONNX to a plan: operations and the tensors that they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpn_engine.backends.native.ops import Op
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.shapes import Shape, infer_shapes

Array = NDArray[Any]


class EightBits(NamedTuple):
    """What a weight is made of: int8 ``values`` in its shape, times the float32 ``scale`` (O,) of its channels."""

    values: Array
    scale: Array


@dataclass(slots=True)
class Network:
    """A program under change.

    Attributes:
        input: the value that is given; ``example`` is a shape that it can have, large enough that maps are more than
            one cell.
        ops: in order. outputs: values that are asked for.
        weights: float32 arrays by name, convolutions (O, kH, kW, C / groups).
        eight_bits: what those of them are made of that a quantised model stores in 8 bits.
    """

    input: str
    example: Shape
    ops: list[Op]
    outputs: list[str]
    weights: dict[str, Array]
    eight_bits: dict[str, EightBits] = field(default_factory=dict)

    def count_readers(self) -> Counter[str]:
        """How often each value is read, as an output too."""
        return Counter([name for op in self.ops for name in op.inputs] + self.outputs)

    def makers(self) -> dict[str, int]:
        """The index of the operation that makes each value."""
        return {op.output: i for i, op in enumerate(self.ops)}

    def shapes(self) -> dict[str, Shape]:
        """The shape of every value for the example. Raises ValueError for what does not fit together."""
        weights = {name: array.shape for name, array in self.weights.items()}
        return infer_shapes(self.ops, {self.input: self.example}, weights)

    def replace(self, ops: Sequence[Op]) -> None:
        """Take other operations; tensors that none of them reads are dropped."""
        self.ops = list(ops)
        used = {name for op in self.ops for name in op.weights}
        self.weights = {name: array for name, array in self.weights.items() if name in used}

    def program(self) -> Program:
        """As it is, in float32."""
        return Program(input=self.input, ops=tuple(self.ops), outputs=tuple(self.outputs))

    def add_weight(self, name: str, array: Array) -> str:
        """Store a tensor once under ``name``, int8 or float32; what is there under that name must be the same."""
        if name not in self.weights:
            dtype = np.int8 if array.dtype == np.int8 else np.float32
            self.weights[name] = np.array(array, dtype=dtype, order="C")
        return name
