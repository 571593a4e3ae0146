"""A small ONNX graph run by ONNX Runtime and by the native backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from fpn_engine.backends.native.executor import CpuExecutor
from fpn_engine.backends.native.program import Program, read_program
from fpn_export.native import fuse, in_float32, lower
from fpn_export.native.network import Network

TOLERANCE = 2e-5  # of the largest magnitude: sums of a few hundred float32 products in another order
Array = NDArray[Any]


def make_model(
    nodes: Sequence[NodeProto],
    shape: Sequence[int | str | None],
    constants: dict[str, Array] | None = None,
    *,
    outputs: Sequence[str] = ("y",),
    opset: int = 20,
) -> ModelProto:
    """A model of one input ``x``."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def node(kind: str, *inputs: str, output: str = "y", **attributes: Any) -> NodeProto:
    return helper.make_node(kind, list(inputs), [output], **attributes)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def run_ort(model: ModelProto, x: Array, *, optimise: bool = True) -> list[Array]:
    """ONNX Runtime's answers; its optimiser merges two roundings in a row."""
    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, {session.get_inputs()[0].name: x})]


def run_network(network: Network, x: Array, *, all_in_arena: bool = False) -> list[Tensor]:
    """The outputs on an ONNX input, after a round trip through the plan's form."""
    program, weights = in_float32(network)
    return run_program(program, weights, x, all_in_arena=all_in_arena)


def run_program(program: Program, weights: dict[str, Tensor], x: Array, *, all_in_arena: bool = False) -> list[Tensor]:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert read_program(program.to_json().encode(), shapes) == program
    executor = CpuExecutor(program, weights, all_in_arena=all_in_arena)
    given = torch.from_numpy(x)
    return executor(given.permute(0, 2, 3, 1) if x.ndim == 4 else given)


def assert_same(model: ModelProto, *inputs: Array, tolerance: float = TOLERANCE) -> Network:
    """Both run the same, unfused and fused, with and without everything in the arena; returns the fused network."""
    plain, fused = lower(model), fuse(lower(model))
    for x in inputs:
        expected = run_ort(model, x)
        for network in (plain, fused):
            for all_in_arena in (False, True):
                outputs = run_network(network, x, all_in_arena=all_in_arena)
                assert len(outputs) == len(expected)
                for output, theirs in zip(outputs, expected, strict=True):
                    ours = output.permute(0, 3, 1, 2) if output.ndim == 4 else output
                    assert_close(ours.numpy(), theirs, tolerance)
    return fused


def assert_close(ours: Array, theirs: Array, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * max(1.0, float(np.abs(theirs).max()))


def kinds(network: Network) -> list[str]:
    return [op.KIND for op in network.ops]
