"""One ONNX operator, run by ONNX Runtime: the oracle that shares no code with torch."""

from __future__ import annotations

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import helper


def run_node(op: str, *inputs: NDArray, opset: int, outputs: int = 1, **attributes: object) -> list[NDArray]:
    """What operator ``op`` of this opset makes of ``inputs`` on the CPU."""
    names = [f"in{i}" for i in range(len(inputs))]
    results = [f"out{i}" for i in range(outputs)]
    types = [helper.np_dtype_to_tensor_dtype(value.dtype) for value in inputs]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, **attributes)],
        op,
        [helper.make_tensor_value_info(n, t, v.shape) for n, t, v in zip(names, types, inputs, strict=True)],
        [helper.make_empty_tensor_value_info(name) for name in results],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, dict(zip(names, inputs, strict=True)))]
