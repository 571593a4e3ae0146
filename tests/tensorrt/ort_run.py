"""ONNX Runtime on graphs of any type that it runs, one thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

ERRORS_ONLY = 3


def open_session(model: ModelProto) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = 1
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):  # its fusions take fp8 for int8
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: Any, value: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs by name; the one input is given in the type that it has."""
    given = session.get_inputs()[0]
    value = value.astype(np.float16 if given.type == "tensor(float16)" else np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {given.name: value}), strict=True))
