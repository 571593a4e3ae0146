"""An ONNX graph to lower: its constants, folded, and the shapes that its values have when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fpn_engine.backends.native.shapes import Shape
from fpn_engine.backends.ort import open_session
from fpn_engine.errors import ModelError
from fpn_export.native.network import Array, EightBits

# Batches and sides that a symbolic size is tried with; multiples of what any pyramid divides by.
_BATCHES, _SIDES = (1, 2), ((256, 384), (384, 512))


@dataclass(frozen=True)
class Node:
    """One ONNX node; ``inputs`` that are left out are empty."""

    kind: str
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, proto: NodeProto) -> Node:
        attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        outputs = list(proto.output)
        return cls(proto.op_type, proto.name or outputs[0], list(proto.input), outputs, attributes)

    def input(self, index: int) -> str:
        """The name of an input, empty if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def get(self, name: str, default: Any) -> Any:
        """An attribute, text decoded."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value


class Graph:
    """An ONNX model of one input of known channels.

    Attributes:
        nodes: those that compute, in order. constants: initializers, Constant nodes and what follows from them alone.
        eight_bits: of constants that are dequantised int8. input: name of the input. outputs: names of the outputs.
    """

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self.constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.eight_bits: dict[str, EightBits] = {}
        given = [value for value in model.graph.input if value.name not in self.constants]
        if len(given) != 1:
            raise ModelError(f"the native backend runs networks of one input, not of {len(given)}")
        self.input = given[0].name
        self._sides = [d.dim_value for d in given[0].type.tensor_type.shape.dim]
        self.outputs = [value.name for value in model.graph.output]
        self.nodes = [node for node in map(self._fold, model.graph.node) if node]

    @property
    def example(self) -> Shape:
        """A shape that the input can have, as ONNX has it: (N, C, H, W) or (R, F)."""
        return self._examples[0]

    @cached_property
    def shapes(self) -> list[dict[str, Shape]]:
        """The shapes of all values for inputs of several sizes, as ONNX Runtime finds them."""
        model = ModelProto()
        model.CopyFrom(self._model)
        known = {value.name for value in model.graph.output}
        names = [name for node in self.nodes for name in node.outputs if name and name not in known]
        model.graph.output.extend(self._inferred[name] for name in names if name in self._inferred)
        session = open_session(model.SerializeToString(), threads=1)
        found = []
        for shape in self._examples:
            outputs = session.run(None, {self.input: np.zeros(shape, np.float32)})
            values = zip((output.name for output in session.get_outputs()), outputs, strict=True)
            found.append({name: tuple(value.shape) for name, value in values} | {self.input: shape})
        return found

    @cached_property
    def _inferred(self) -> dict[str, ValueInfoProto]:
        """Type and shape of inner values, as far as ONNX can tell."""
        graph = onnx.shape_inference.infer_shapes(self._model).graph
        return {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}

    @cached_property
    def _examples(self) -> list[Shape]:
        sides = self._sides
        if len(sides) not in (2, 4) or sides[1] < 1:
            raise ModelError("the native backend runs networks on (N, C, H, W) or (R, F) of a fixed C or F")
        examples: list[Shape] = []
        for batch, (h, w) in zip(_BATCHES, _SIDES, strict=True):
            tried = (batch, sides[1], h, w)
            examples.append(tuple(side or other for side, other in zip(sides, tried, strict=False)))
        return examples

    def _fold(self, proto: NodeProto) -> Node | None:
        """A node that computes, or None for one whose result is constant."""
        if proto.op_type == "CastLike" and proto.input[0] in self.constants:
            like = self._inferred.get(proto.input[1])
            if like is not None and like.type.tensor_type.elem_type == TensorProto.FLOAT:
                self.constants[proto.output[0]] = self.constants[proto.input[0]].astype(np.float32)
                return None
        if proto.op_type == "Constant" or (proto.input and all(n in self.constants or not n for n in proto.input)):
            if proto.op_type == "DequantizeLinear" and (bits := self._eight_bits(proto)):
                self.eight_bits[proto.output[0]] = bits
            evaluator = ReferenceEvaluator(proto)
            try:
                results = evaluator.run(None, {name: self.constants[name] for name in proto.input if name})
            except Exception as error:  # whatever the operator's reference raises
                raise ModelError(f"cannot compute the constant {proto.output[0]}: {error}") from None
            self.constants |= {name: np.asarray(value) for name, value in zip(proto.output, results, strict=True)}
            return None
        return Node.of(proto)

    def _eight_bits(self, proto: NodeProto) -> EightBits | None:
        """Values and scales of a weight in int8 that has zero points of 0 and a scale for each output channel."""
        values, scale = (self.constants[name] for name in proto.input[:2])
        zeros = self.constants.get(proto.input[2]) if len(proto.input) > 2 else None
        axis = next((a.i for a in proto.attribute if a.name == "axis"), 1)  # 1 is ONNX's default
        if values.dtype != np.int8 or values.ndim < 2 or (zeros is not None and zeros.any()):
            return None
        if scale.size != 1 and (scale.ndim, axis) != (1, 0):
            return None
        return EightBits(values, np.broadcast_to(scale.reshape(-1), len(values)).astype(np.float32))
