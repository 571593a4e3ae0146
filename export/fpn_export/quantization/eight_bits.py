"""The two forms of 8 bits, both symmetric: int8 in equal steps, fp8 (E4M3) in steps that grow with the number."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.helper import tensor_dtype_to_np_dtype

INT8, FP8 = "int8", "fp8"
LARGEST = {INT8: 127.0, FP8: 448.0}  # the number that a range ends at
DTYPES: dict[str, np.dtype[Any]] = {
    INT8: tensor_dtype_to_np_dtype(TensorProto.INT8),
    FP8: tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN),
}
NARROWEST = 1e-8  # range: a channel of zeros has a scale too


def find_scale(largest: Any, precision: str) -> Any:
    """float32 scale of the range up to ``largest``, a number or an array."""
    return (np.maximum(np.asarray(largest, np.float64), NARROWEST) / LARGEST[precision]).astype(np.float32)


def to_steps(values: NDArray[Any], scale: Any, precision: str) -> NDArray[Any]:
    """``values / scale`` rounded half to even and cut off at the ends of the range, in 8 bits.

    -128 is left out: weights are as far from zero on both sides.
    """
    largest = LARGEST[precision]
    steps = np.clip(values / scale, -largest, largest)
    return (np.rint(steps) if precision == INT8 else steps).astype(DTYPES[precision])
