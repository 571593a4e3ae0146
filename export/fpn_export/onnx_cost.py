"""What a detector's neural parts cost: multiply-adds and bytes of each stage, counted on the ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from fpn_engine.spec import ModelSpec
from fpn_export.onnx_cut import cut_head, cut_trunk

Shape = tuple[int, ...]

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool"})
JOINS = frozenset({"Add", "Sub", "Mul", "Concat"})
STEM, LATERAL, OUTPUT, RPN, RPN_OUTPUT, HEAD = "stem", "lateral", "FPN output", "RPN hidden", "RPN output", "box head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The least that any implementation does whose operations are fused up to convolutions and pools.

    Attributes:
        macs: multiply-adds of convolutions and fully connected layers.
        weight_bytes: of their weights and biases, each tensor once.
        activation_bytes: each of them and each pool reads its input once and writes its output once; of an addition the
            other operand is read, before it was upsampled.
    """

    macs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Self) -> Cost:
        return Cost(
            macs=self.macs + other.macs,
            weight_bytes=self.weight_bytes + other.weight_bytes,
            activation_bytes=self.activation_bytes + other.activation_bytes,
        )

    def floor_seconds(self, flops: float, bandwidth: float) -> float:
        """The least time on a device (the roofline of Williams et al. 2009); of several operations these add up.

        Args: flops: operations per second, a multiply-add is two. bandwidth: bytes per second.
        """
        return max(2 * self.macs / flops, (self.weight_bytes + self.activation_bytes) / bandwidth)


def count_detector(
    model: ModelProto, spec: ModelSpec, size: tuple[int, int], *, batch: int = 1, itemsize: int = 2
) -> dict[str, list[Cost]]:
    """What each stage of an exported detector costs, operation by operation, in the order of the dataflow.

    Stages: "stem" up to the first pool, "c2".. the residual stages, "lateral" the 1x1 convolutions and the top-down
    path, "FPN output" the 3x3 convolutions behind them, "RPN hidden", "RPN output", "box head" on all proposals.

    Args:
        size: padded height and width. itemsize: bytes per number of weights and activations.
    Raises: ValueError if a shape in the graph cannot be worked out.
    """
    stages = _count_trunk(cut_trunk(model, spec), spec, (batch, 3, *size), itemsize)
    if spec.has_box_head:
        width = spec.feature_channels * spec.box_roi_pool.output_size**2
        rows = batch * spec.rpn_post_nms_top_n_test
        stages[HEAD] = _paid(count_nodes(cut_head(model, spec), (rows, width), itemsize).values())
    return stages


def count_nodes(model: ModelProto, shape: Shape, itemsize: int) -> dict[str, Cost]:
    """Cost by name of a node's first output, of a graph with one input, which gets ``shape``."""
    shapes = _infer_shapes(model, shape)
    weights = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    sources = _find_sources(model.graph)
    costs, seen = {}, set[str]()
    for node in model.graph.node:
        stored = [name for name in node.input if name in weights and name not in seen]
        seen.update(stored)
        costs[node.output[0]] = Cost(
            macs=_count_macs(node, shapes),
            weight_bytes=itemsize * sum(weights[name] for name in stored) * (node.op_type in PRODUCTS),
            activation_bytes=itemsize * _count_activations(node, shapes, weights, sources),
        )
    return costs


def _count_trunk(trunk: ModelProto, spec: ModelSpec, shape: Shape, itemsize: int) -> dict[str, list[Cost]]:
    stages: dict[str, list[Cost]] = {}
    of = _find_stages(trunk.graph, spec)
    for name, cost in count_nodes(trunk, shape, itemsize).items():
        stages.setdefault(of[name], []).append(cost)
    return {name: _paid(costs) for name, costs in stages.items() if _paid(costs)}


def _paid(costs: Iterable[Cost]) -> list[Cost]:
    """Those of operations that cost something by themselves."""
    return [cost for cost in costs if cost != Cost()]


def _find_stages(graph: GraphProto, spec: ModelSpec) -> dict[str, str]:
    """The stage of every value: that of the first milestone that needs it."""
    producers = {name: node for node in graph.node for name in node.output}
    pool = next((node.output[0] for node in graph.node if node.op_type == "MaxPool"), "")
    bodies = sorted(name for name in producers if name[0] == "c" and name[1:].isdecimal())
    found: dict[str, str] = {}

    def claim(name: str, stage: str, behind: str) -> None:
        """``name`` is made in ``stage``, all that it needs and that nobody has claimed in ``behind``."""
        waiting = [(name, stage)]
        while waiting:
            value, its = waiting.pop()
            if value in producers and value not in found:
                found[value] = its
                waiting += [(source, behind) for source in producers[value].input]

    claim(pool, STEM, STEM)
    for name in bodies:
        claim(name, name, name)
    for name in spec.level_names:
        claim(name, OUTPUT, LATERAL)
    for kind in ("objectness", "deltas"):
        for name in spec.level_names:
            claim(f"{kind}_{name}", RPN_OUTPUT, RPN)
    for node in graph.node:  # the renaming at the end
        found.setdefault(node.output[0], OUTPUT)
    return found


def _count_macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    if node.op_type not in PRODUCTS:
        return 0
    weight = shapes[node.input[1]]
    if node.op_type == "Conv":  # (O, C / groups, kH, kW)
        return math.prod(shapes[node.output[0]]) * math.prod(weight[1:])
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _count_activations(
    node: NodeProto, shapes: Mapping[str, Shape], weights: Mapping[str, int], sources: Mapping[str, str]
) -> int:
    """Numbers read and written."""
    given = [name for name in node.input if name and name not in weights]
    if node.op_type in PRODUCTS | POOLS:
        return sum(math.prod(shapes[name]) for name in (*given, node.output[0]))
    if node.op_type in JOINS:
        return sum(math.prod(shapes[sources.get(name, name)]) for name in given[1:])
    return 0


def _find_sources(graph: GraphProto) -> dict[str, str]:
    """What an upsampled value was before."""
    return {node.output[0]: node.input[0] for node in graph.node if node.op_type in ("Resize", "Upsample")}


def _infer_shapes(model: ModelProto, shape: Shape) -> dict[str, Shape]:
    fixed = ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for dim, side in zip(fixed.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = side
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    for node in graph.node:
        if node.op_type in PRODUCTS | POOLS | JOINS and 0 in shapes.get(node.output[0], (0,)):
            raise ValueError(f"the shape of {node.output[0]} cannot be worked out from the graph")
    return shapes
