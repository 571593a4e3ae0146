"""What is quantised: the layers of a detector's graph, and the values between them that become 8 bits wide."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from fpn_engine.errors import ModelError, OptionError
from fpn_export.tensorrt.typed_graph import RESULTS

# Operations that hand numbers on as they are: what is on a grid stays on it.
MOVES = frozenset({"MaxPool", "Resize", "Transpose", "Flatten", "Reshape", "Identity"})


@dataclass(frozen=True)
class Layer:
    """A convolution or fully connected layer: its tensors and every node that runs it.

    Attributes:
        name: of its weight in the checkpoint, without ``.weight``. weight: the initializer, (O, ...).
        nodes: five for an RPN head that all levels share.
    """

    name: str
    weight: str
    nodes: tuple[NodeProto, ...]

    @property
    def inputs(self) -> list[str]:
        return [node.input[0] for node in self.nodes]


class Network:
    """The graph of a detector, whole or cut, as quantisation sees it.

    Attributes: layers: those that can be quantised, in order: all but the last, which make objectness, deltas, class
        logits and box deltas. Eight bits would make ties of what differs there.
    """

    def __init__(self, model: ModelProto) -> None:
        self.graph: GraphProto = model.graph
        self.weights: Mapping[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)

    @cached_property
    def layers(self) -> list[Layer]:
        found: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            if self._is_layer(node):
                found.setdefault(node.input[1], []).append(node)
        return [
            Layer(weight.removesuffix(".weight"), weight, tuple(nodes))
            for weight, nodes in found.items()
            if not any(self._is_last(node) for node in nodes)
        ]

    def weight(self, layer: Layer) -> NDArray[np.float32]:
        """(O, ...). Raises ModelError for NaN or infinity, which no integer stands for."""
        array = numpy_helper.to_array(self.weights[layer.weight])
        if not np.isfinite(array).all():
            raise ModelError(f"the weight {layer.weight} holds NaN or infinity; export a sound checkpoint")
        return array

    def points(self, layers: Iterable[Layer]) -> list[str]:
        """The values that get a Q/DQ pair if ``layers`` are quantised, in order.

        Their inputs; and their results, as an integer convolution leaves integers.
        """
        wanted = set()
        for layer in layers:
            wanted.update(layer.inputs)
            for node in layer.nodes:
                wanted.add(self.result(node))
        ordered = [value.name for value in self.graph.input] + [name for n in self.graph.node for name in n.output]
        return [name for name in ordered if name in wanted]

    def sources(self, points: Collection[str]) -> dict[str, str]:
        """For each point the one whose range is its own: numbers that were only moved are on a grid already."""
        found: dict[str, str] = {}
        for name in points:
            source = name
            while (maker := self.makers.get(source)) is not None and maker.op_type in MOVES:
                source = maker.input[0]
                if source in points:
                    break
            found[name] = found.get(source, source) if source in points else name
        return found

    def only_reader(self, name: str) -> NodeProto | None:
        """The node that alone reads a value, which is no output either."""
        readers = self.readers.get(name, [])
        is_output = any(value.name == name for value in self.graph.output)
        return readers[0] if len(readers) == 1 and not is_output else None

    def result(self, node: NodeProto) -> str:
        """What a layer gives: behind its activation, and before the addition of a residual."""
        reader = self.only_reader(node.output[0])
        if reader is None or reader.op_type != "Relu":
            return node.output[0]
        after = self.only_reader(reader.output[0])  # a maximum of activations, where the next layer reads that alone
        if after is not None and after.op_type == "MaxPool" and self._feeds_layers(after.output[0]):
            return after.output[0]
        return reader.output[0]

    def _feeds_layers(self, name: str) -> bool:
        return any(self._is_layer(node) for node in self.readers.get(name, []))

    def _is_layer(self, node: NodeProto) -> bool:
        if node.op_type not in ("Conv", "Gemm") or node.input[1] not in self.weights:
            return False
        flags = {attribute.name: attribute.i for attribute in node.attribute}
        return node.op_type == "Conv" or (flags.get("transB", 0), flags.get("transA", 0)) == (1, 0)

    def _is_last(self, node: NodeProto) -> bool:
        return node.output[0].startswith(RESULTS)


def select_layers(layers: Sequence[Layer], patterns: Sequence[str]) -> set[str]:
    """Names of the layers that a pattern matches, a whole name or one with ``*``.

    Raises: OptionError for a pattern that matches none.
    """
    names = [layer.name for layer in layers]
    found: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            examples = ", ".join(names[:3])
            raise OptionError(f"there is no layer {pattern!r} to keep in float; the layers are {examples}, ...")
        found.update(matching)
    return found
