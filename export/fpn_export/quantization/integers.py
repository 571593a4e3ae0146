"""Q/DQ graphs in ONNX Runtime's integer operators, which its CPU provider runs on VNNI.

ONNX Runtime makes them of Q/DQ patterns by itself only where a Q stands right behind a convolution, and a ReLU usually
stands between. Rounding is monotonous and keeps 0, so that Q(relu(x)) = relu(Q(x)) and Q(max(x)) = max(Q(x)): the
same numbers come out. An int8 q of zero point 0 is kept as the uint8 q + 128, which VNNI multiplies with int8 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fpn_export.quantization.layers import MOVES, Network

MICROSOFT = "com.microsoft"
OFFSET = 128  # of the uint8 form
DEQUANTIZE, QUANTIZE = "DequantizeLinear", "QuantizeLinear"


@dataclass(frozen=True)
class Integers:
    """A value in 8 bits: its name, and the initializer of its scale."""

    name: str
    scale: str


def use_integers(model: ModelProto) -> ModelProto:
    """A copy of a cut Q/DQ network of int8 whose quantised layers are integer operators, for ONNX Runtime on a CPU.

    What does not fit stays as it is, between Q and DQ.
    """
    return _Rewriter(model).run()


class _Rewriter:
    def __init__(self, model: ModelProto) -> None:
        self._model = ModelProto()
        self._model.CopyFrom(model)
        self._graph = self._model.graph
        self._network = Network(self._model)
        self._arrays = {name: numpy_helper.to_array(t) for name, t in self._network.weights.items()}
        self._added: dict[str, TensorProto] = {}
        self._nodes: list[NodeProto] = []
        self._integers: dict[str, Integers] = {}
        self._made: set[str] = {value.name for value in self._graph.input}
        self._outputs = {value.name for value in self._graph.output}
        self._offset = self._constant("offset", np.array(OFFSET, np.uint8))

    def run(self) -> ModelProto:
        move: Callable[[NodeProto], bool] = self._move
        handlers = dict.fromkeys(MOVES, move) | {
            QUANTIZE: self._quantize,
            DEQUANTIZE: self._dequantize,
            "Conv": self._convolve,
            "Gemm": self._multiply,
            "Add": self._add,
            "Relu": self._activate,
        }
        for node in self._graph.node:
            handler = handlers.get(node.op_type)
            if handler is None or not handler(node):
                for name in node.input:
                    self._need_float(name)
                self._emit(node)
        for name in self._outputs:
            self._need_float(name)
        self._prune()
        return self._model

    def _quantize(self, node: NodeProto) -> bool:
        value, scale = node.input[:2]
        if self._arrays[node.input[2]].dtype != np.int8 or self._arrays[scale].ndim:
            return False
        known = self._integers.get(value)
        if known is None or self._arrays[known.scale] != self._arrays[scale]:
            self._need_float(value)
            self._emit(helper.make_node(QUANTIZE, [value, scale, self._offset], list(node.output), name=node.name))
            known = Integers(node.output[0], scale)
        self._integers[node.output[0]] = known
        return True

    def _dequantize(self, node: NodeProto) -> bool:
        if node.input[0] in self._arrays:  # a weight: read where it is needed
            self._emit(node)
            return True
        if (known := self._integers.get(node.input[0])) is None:  # of another type
            return False
        self._integers[node.output[0]] = known
        return True

    def _convolve(self, node: NodeProto) -> bool:
        x, weight, target = self._integers.get(node.input[0]), self._weight(node), self._target(node.output[0])
        if x is None or weight is None or target is None:
            return False
        values, scales, zeros = weight
        inputs = [x.name, x.scale, self._offset, values, scales, zeros, target, self._offset]
        inputs += self._bias(node, x.scale, scales)
        self._make("QLinearConv", inputs, node, target, "", node.attribute)
        return True

    def _multiply(self, node: NodeProto) -> bool:
        x, weight, target = self._integers.get(node.input[0]), self._weight(node), self._target(node.output[0])
        if x is None or weight is None or target is None:
            return False
        values, scales, zeros = weight
        bias = self._bias(node, x.scale, scales) or [""]
        inputs = [x.name, x.scale, self._offset, values, scales, zeros, *bias, target, self._offset]
        taken = [attribute for attribute in node.attribute if attribute.name != "beta"]  # which is in the bias
        self._make("QGemm", inputs, node, target, MICROSOFT, taken)
        return True

    def _add(self, node: NodeProto) -> bool:
        a, b = (self._integers.get(name) for name in node.input)
        target = self._target(node.output[0])
        if a is None or b is None or target is None:
            return False
        inputs = [a.name, a.scale, self._offset, b.name, b.scale, self._offset, target, self._offset]
        self._make("QLinearAdd", inputs, node, target, MICROSOFT)
        return True

    def _activate(self, node: NodeProto) -> bool:
        if (x := self._integers.get(node.input[0])) is None:
            return False
        self._make("Max", [x.name, self._offset], node, x.scale)
        return True

    def _move(self, node: NodeProto) -> bool:
        if (x := self._integers.get(node.input[0])) is None:
            return False
        modes = {a.s for a in node.attribute if a.name == "mode"}
        if node.op_type == "Resize" and modes - {b"nearest"}:
            return False
        self._make(node.op_type, [x.name, *node.input[1:]], node, x.scale, "", node.attribute)
        return True

    def _weight(self, node: NodeProto) -> tuple[str, str, str] | None:
        """Values, scales and zero points of a weight that is dequantised for this node."""
        maker = self._network.makers.get(node.input[1])
        if maker is None or maker.op_type != DEQUANTIZE or maker.input[0] not in self._arrays:
            return None
        values, scales, zeros = maker.input
        return (values, scales, zeros) if self._arrays[values].dtype == np.int8 else None

    def _bias(self, node: NodeProto, x_scale: str, scales: str) -> list[str]:
        """The bias in units of the sums, as int32."""
        if len(node.input) < 3 or not node.input[2]:
            return []
        unit = self._arrays[x_scale].astype(np.float64) * self._arrays[scales]
        limits = np.iinfo(np.int32)
        factor = next((attribute.f for attribute in node.attribute if attribute.name == "beta"), 1.0)
        steps = np.clip(np.rint(self._arrays[node.input[2]] * factor / unit), limits.min, limits.max)
        return [self._constant(f"{node.output[0]}.bias", steps.astype(np.int32))]

    def _target(self, name: str) -> str | None:
        """The scale of the Q that a value goes to, alone, through ReLUs and maxima if through anything."""
        while (reader := self._network.only_reader(name)) is not None:
            if reader.op_type == QUANTIZE:
                return reader.input[1]
            if reader.op_type not in ("Relu", "MaxPool"):
                return None
            name = reader.output[0]
        return None

    def _make(
        self, kind: str, inputs: list[str], node: NodeProto, scale: str, domain: str = "", attributes: object = ()
    ) -> None:
        """An integer operator in the place of ``node``."""
        name = f"{node.output[0]}.integers"
        made = helper.make_node(kind, inputs, [name], name=node.name or name, domain=domain)
        made.attribute.extend(attributes)  # type: ignore[arg-type]
        self._emit(made)
        self._integers[node.output[0]] = Integers(name, scale)

    def _need_float(self, name: str) -> None:
        if name in self._integers and name not in self._made:
            x = self._integers[name]
            self._emit(helper.make_node(DEQUANTIZE, [x.name, x.scale, self._offset], [name], name=name))

    def _emit(self, node: NodeProto) -> None:
        self._nodes.append(node)
        self._made.update(node.output)

    def _constant(self, name: str, array: ArrayLike) -> str:
        self._added[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def _prune(self) -> None:
        """Keep what an output needs."""
        needed, kept = set(self._outputs), []
        for node in reversed(self._nodes):
            if needed & set(node.output):
                kept.append(NodeProto.FromString(node.SerializeToString()))
                needed.update(node.input)
        tensors = [*self._graph.initializer, *self._added.values()]
        tensors = [TensorProto.FromString(t.SerializeToString()) for t in tensors if t.name in needed]
        for field, values in (("node", kept[::-1]), ("initializer", tensors), ("value_info", [])):
            del getattr(self._graph, field)[:]
            getattr(self._graph, field).extend(values)
        if MICROSOFT not in {entry.domain for entry in self._model.opset_import}:
            self._model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
