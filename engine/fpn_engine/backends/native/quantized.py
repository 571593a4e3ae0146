"""The operations on 8 bits, as plain data: a value x is kept as the uint8 u with x = step (u - 128).

That is the int8 q = u - 128 of a symmetric Q/DQ pair, in the form which VNNI multiplies with int8 weights. A value has
one step, a weight one for each output channel. Sums are int32; each operation rounds once, half to even, and cuts off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fpn_engine.backends.native.ops import (
    FLOAT32,
    INT8,
    NONE,
    UINT8,
    Activation,
    Convolution,
    Op,
)

OFFSET = 128  # the uint8 of 0
LARGEST = 255
FUSED_ACTIVATIONS = ("none", "relu")  # that need no number beside the step


def _require_step(step: float) -> None:
    if not (step > 0 and math.isfinite(step)):
        raise ValueError(f"a step is a number above 0, not {step}")


def _require_fused(activation: Activation) -> None:
    if activation.kind not in FUSED_ACTIVATIONS:
        raise ValueError(f"in 8 bits an activation is one of {', '.join(FUSED_ACTIVATIONS)}, not {activation.kind!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize(Op):
    """float32 to 8 bits: u = clamp(round(x / step), -128, 127) + 128."""

    KIND: ClassVar[str] = "quantize"
    TAKES: ClassVar[tuple[str, ...]] = (FLOAT32,)

    step: float

    def __post_init__(self) -> None:
        super(Quantize, self).__post_init__()
        _require_step(self.step)

    @property
    def result_dtype(self) -> str:
        return UINT8


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantize(Op):
    """8 bits to float32, by the step of the value."""

    KIND: ClassVar[str] = "dequantize"
    TAKES: ClassVar[tuple[str, ...]] = (UINT8,)

    @property
    def result_dtype(self) -> str:
        return FLOAT32


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedConv(Convolution):
    """Convolution in 8 bits, and at the end rounding to ``step``.

    ``weight`` is int8, ``scale`` the float32 (O,) of its channels, ``bias`` float32. The residual is of 8 bits and has
    a step of its own.
    """

    KIND: ClassVar[str] = "quantized_conv"
    TAKES: ClassVar[tuple[str, ...]] = (UINT8,)

    scale: str
    step: float

    def __post_init__(self) -> None:
        super(QuantizedConv, self).__post_init__()
        _require_step(self.step)
        _require_fused(self.activation)

    def tensor_dtypes(self, dtype: str) -> dict[str, str]:
        return dict.fromkeys(self.weights, FLOAT32) | {self.weight: INT8}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLinear(Op):
    """Rows (R, F) in 8 bits times ``weight`` (O, F) transposed; tensors and rounding as of QuantizedConv."""

    KIND: ClassVar[str] = "quantized_linear"
    TAKES: ClassVar[tuple[str, ...]] = (UINT8,)

    weight: str
    scale: str
    step: float
    bias: str | None = None
    activation: Activation = NONE

    def __post_init__(self) -> None:
        super(QuantizedLinear, self).__post_init__()
        _require_step(self.step)
        _require_fused(self.activation)

    def tensor_dtypes(self, dtype: str) -> dict[str, str]:
        return dict.fromkeys(self.weights, FLOAT32) | {self.weight: INT8}


QUANTIZED_OPS: tuple[type[Op], ...] = (Quantize, Dequantize, QuantizedConv, QuantizedLinear)
