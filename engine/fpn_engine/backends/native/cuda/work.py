"""Work: a convolution or fully connected layer on one shape, all that a choice of implementation depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fpn_engine.backends.native.ops import UNIT, Activation, Conv, Linear, Op, Padding, Pair
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.shapes import Shape, infer_shapes

WEIGHT, BIAS = "weight", "bias"  # names of the tensors of the operation that stands for a piece of work


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One fused layer.

    Attributes:
        x: (N, H, W, C) or (R, F). weight: (O, kH, kW, C / groups) or (O, F). out: of the result.
        has_residual: added after the bias, upsampled by ``upsample``.
        dtype, out_dtype: number types of the operands and of the result. The others are those of the operation.
    """

    x: Shape
    weight: Shape
    out: Shape
    stride: Pair = UNIT
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = UNIT
    groups: int = 1
    has_bias: bool = True
    has_residual: bool = False
    upsample: Pair = UNIT
    activation: Activation
    dtype: str
    out_dtype: str

    @classmethod
    def of(cls, op: Conv | Linear, shapes: Mapping[str, Shape], dtypes: Mapping[str, str], weight: Shape) -> Work:
        """The work of an operation of a program, given the shapes and number types of its values."""
        geometry = {}
        if isinstance(op, Conv):
            geometry = {name: getattr(op, name) for name in ("stride", "padding", "dilation", "groups", "upsample")}
        return cls(
            x=tuple(shapes[op.inputs[0]]),
            weight=tuple(weight),
            out=tuple(shapes[op.output]),
            has_bias=op.bias is not None,
            has_residual=len(op.inputs) == 2,
            activation=op.activation,
            dtype=dtypes[op.inputs[0]],
            out_dtype=dtypes[op.output],
            **geometry,
        )

    @property
    def is_convolution(self) -> bool:
        return len(self.x) == 4

    @property
    def is_pointwise(self) -> bool:
        """Every output cell has one input cell: a matrix product."""
        return not self.is_convolution or (self.weight[1:3] == (1, 1) and not any(self.padding) and self.groups == 1)

    @property
    def rows(self) -> int:
        """Rows of the product: output cells."""
        return math.prod(self.out[:-1])

    @property
    def columns(self) -> int:
        """Columns of the product: output channels."""
        return self.out[-1]

    @property
    def depth(self) -> int:
        """Products that are summed for each number of the result."""
        return math.prod(self.weight[1:])

    @property
    def family(self) -> str:
        """All but the size of the map and the number of images."""
        kernel = "x".join(map(str, self.weight))
        parts = ["conv" if self.is_convolution else "linear", kernel]
        if self.is_convolution:
            geometry = (self.stride, self.padding, self.dilation)
            parts += [",".join(map(str, values)) for values in geometry] + [f"g{self.groups}"]
        parts += ["bias"] * self.has_bias
        parts += [f"residual{self.upsample[0]}x{self.upsample[1]}"] * self.has_residual
        return " ".join([*parts, self.activation.kind, f"{self.dtype}>{self.out_dtype}"])

    @property
    def key(self) -> str:
        """Names the work in plans and timing caches."""
        return f"{'x'.join(map(str, self.x))} {self.family}"

    def operands(self) -> dict[str, Shape]:
        """Shapes of all that is read, by the names that :meth:`op` has for it."""
        shapes = {"x": self.x, WEIGHT: self.weight}
        shapes |= {BIAS: self.out[-1:]} if self.has_bias else {}
        return shapes | ({"residual": self.residual_shape()} if self.has_residual else {})

    def residual_shape(self) -> Shape:
        n, h, w, c = self.out
        return n, h // self.upsample[0], w // self.upsample[1], c

    def op(self, dtype: str | None = None) -> Conv | Linear:
        """An operation that is this work, of inputs "x" and "residual" and tensors WEIGHT and BIAS."""
        bias = BIAS if self.has_bias else None
        dtype = self.out_dtype if dtype is None and self.out_dtype != self.dtype else dtype
        if not self.is_convolution:
            return Linear(inputs=("x",), output="y", weight=WEIGHT, bias=bias, activation=self.activation, dtype=dtype)
        return Conv(
            inputs=("x", "residual") if self.has_residual else ("x",),
            output="y",
            weight=WEIGHT,
            bias=bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            upsample=self.upsample,
            activation=self.activation,
            dtype=dtype,
        )


def is_heavy(op: Op) -> bool:
    """Whether there are several implementations of it."""
    return isinstance(op, (Conv, Linear))


def collect_work(program: Program, weights: Mapping[str, Shape], shapes: Sequence[Shape]) -> dict[str, Work]:
    """The distinct work of a program on inputs of ``shapes``, by key, in order."""
    dtypes = program.dtypes()
    found = {}
    for shape in shapes:
        values = infer_shapes(program.ops, {program.input: shape}, weights)
        for op in program.ops:
            if isinstance(op, (Conv, Linear)):
                work = Work.of(op, values, dtypes, weights[op.weight])
                found[work.key] = work
    return found
