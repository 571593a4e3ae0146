"""A graph under construction: ONNX nodes and initializers with names that stay the same from build to build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import NodeProto, TensorProto, helper, numpy_helper


class OnnxGraph:
    """Collects nodes; values are named by strings, as ONNX does.

    ``prefix`` begins every name that is not given, so that graphs can be joined.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._used: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def const(self, value: ArrayLike, dtype: Any = None, name: str | None = None) -> str:
        """An initializer; unnamed ones of the same value are shared."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if name is None and key in self._constants:
            return self._constants[key]
        given = name or self._fresh("const")
        if name is None:
            self._constants[key] = given
        self.initializers.append(numpy_helper.from_array(array, given))
        return given

    def int64(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.const(values, np.int64)

    def float32(self, value: float) -> str:
        """A scalar float32 constant."""
        return self.const(value, np.float32)

    def op(self, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Append a node with one output, named ``name`` or after the operator; returns that name."""
        return self.ops(op_type, *inputs, names=[name or self._fresh(op_type)], **attributes)[0]

    def ops(self, op_type: str, *inputs: str, names: Sequence[str] | int, **attributes: Any) -> list[str]:
        """Append a node with several outputs, named or counted."""
        outputs = [self._fresh(op_type) for _ in range(names)] if isinstance(names, int) else list(names)
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def cast(self, value: str, dtype: int) -> str:
        return self.op("Cast", value, to=dtype)

    def dim(self, value: str, axis: int) -> str:
        """Size along ``axis`` as a one-element int64 tensor."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def _fresh(self, stem: str) -> str:
        number = self._used.get(stem, 0)
        self._used[stem] = number + 1
        return f"{self.prefix}{stem.lower()}_{number}"


def tensor_info(name: str, dtype: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(shape))
