"""Lowering: an ONNX graph to the native backend's operations, node by node.

ONNX has maps as (N, C, H, W); here they are (N, H, W, C) throughout, and a transposition between the two is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fpn_engine.backends.native.ops import Op
from fpn_engine.errors import ModelError
from fpn_export.native.graph import Graph, Node
from fpn_export.native.network import Array, EightBits, Network

# Operators whose other inputs are parameters and shapes, which may be computed from sizes.
_ONE_INPUT = frozenset(
    {"Cast", "Clip", "Dropout", "Flatten", "ReduceMean", "Reshape", "Resize", "Squeeze", "Unsqueeze", "Upsample"}
)
Handler = Callable[["Lowering", Node], None]


@dataclass(frozen=True, slots=True)
class Value:
    """What an ONNX value has become.

    Attributes:
        name: in the program. channels: C of a map, F of rows.
        layout: "nchw" for a map as ONNX has it, "nhwc" for one transposed in ONNX too, "rows" for a matrix.
        single: a map of one cell.
        chw: of rows that are a flattened map: C, H, W; ONNX has the columns in this order, the program as H, W, C.
    """

    name: str
    channels: int
    layout: str
    single: bool = False
    chw: tuple[int, int, int] | None = None

    @property
    def is_map(self) -> bool:
        return self.layout == "nchw"


class Lowering:
    """A lowering under way; handlers read values, emit operations and bind the results' ONNX names.

    Args: handlers: by operator.
    Attributes: graph: what is lowered. values: what its values have become so far.
    """

    def __init__(self, graph: Graph, handlers: Mapping[str, Handler]) -> None:
        self.graph, self._handlers = graph, handlers
        example = graph.example
        is_map = len(example) == 4
        if is_map:
            example = (example[0], *example[2:], example[1])
        self.values = {graph.input: Value(graph.input, example[-1], "nchw" if is_map else "rows")}
        self._network = Network(graph.input, example, [], [], {})

    def network(self) -> Network:
        """Lower every node that an output needs."""
        for node in self._needed():
            if node.kind not in self._handlers:
                raise self.refuse(node)
            self._handlers[node.kind](self, node)
        for name in self.graph.outputs:
            value = self.values.get(name)
            if value is None or name == self.graph.input:
                raise ModelError(f"the output {name} of the network is not computed from its input; export it again")
            if value.chw and value.chw[1:] != (1, 1):
                raise ModelError(
                    f"the output {name} is a flattened map, which the native backend has in another order; "
                    "build with --backend onnxruntime"
                )
            if value.name in self._network.outputs:
                raise ModelError(f"the output {name} is another output again; build with --backend onnxruntime")
            self._network.outputs.append(value.name)
        try:
            self._network.shapes()
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"the native backend cannot run this network ({error}); build with --backend onnxruntime"
            ) from None
        return self._network

    def value(self, node: Node, index: int = 0) -> Value:
        """What an input has become. Raises ModelError if it is a constant or not there."""
        name = node.input(index)
        if name not in self.values:
            raise self.refuse(node, "with such inputs")
        return self.values[name]

    def map(self, node: Node, index: int = 0) -> Value:
        """:meth:`value` of a map in ONNX's usual order; raises ModelError for another."""
        value = self.value(node, index)
        if not value.is_map:
            raise self.refuse(node, "on anything but (N, C, H, W)")
        return value

    def constant(self, node: Node, index: int) -> Array | None:
        """An input that is constant, None if it is left out. Raises ModelError if it is computed."""
        name = node.input(index)
        if name and name not in self.graph.constants:
            raise self.refuse(node, "with computed parameters")
        return self.graph.constants[name] if name else None

    def required(self, node: Node, index: int) -> Array:
        """A constant input that must be there."""
        constant = self.constant(node, index)
        if constant is None:
            raise self.refuse(node, "without its parameters")
        return constant

    def is_constant(self, node: Node, index: int) -> bool:
        return node.input(index) in self.graph.constants

    def emit(self, op: Op, node: Node, like: Value, **changes: object) -> None:
        """Append the operation that makes the node's output, a value as ``like`` but for ``changes``."""
        self._network.ops.append(op)
        self.bind(node, replace(like, name=op.output, **changes))  # type: ignore[arg-type]

    def bind(self, node: Node, value: Value) -> None:
        """The node's output is ``value``."""
        self.values[node.outputs[0]] = value

    def weight(self, name: str, array: Array) -> str:
        """Store a tensor under ``name``, or beside another of that name."""
        known = self._network.weights
        free = name
        while free in known and not _same(known[free], array):
            free += "'"
        return self._network.add_weight(free, array)

    def layer_weight(self, node: Node, arrange: Callable[[Array], Array]) -> str:
        """Store the weight ``node.input(1)`` as ``arrange`` orders it, in 8 bits too if it has them."""
        name = self.weight(node.input(1), arrange(self.required(node, 1)))
        if bits := self.graph.eight_bits.get(node.input(1)):
            self._network.eight_bits[name] = EightBits(arrange(bits.values), bits.scale)
        return name

    def refuse(self, node: Node, why: str = "") -> ModelError:
        """The error for what this backend does not have."""
        what = f"{node.kind} {why}".strip()
        return ModelError(
            f"the native backend does not have the operator {what} ({node.name}); "
            "build with --backend onnxruntime, which runs it"
        )

    def _needed(self) -> list[Node]:
        needed, nodes = set(self.graph.outputs), []
        for node in reversed(self.graph.nodes):
            if needed.isdisjoint(node.outputs):
                continue
            nodes.append(node)
            needed.update(node.inputs[:1] if node.kind in _ONE_INPUT else node.inputs)
        return nodes[::-1]


def _same(stored: Array, array: Array) -> bool:
    return stored.shape == array.shape and np.array_equal(stored, array.astype(np.float32), equal_nan=True)
