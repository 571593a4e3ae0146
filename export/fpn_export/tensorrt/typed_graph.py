"""Strongly typed graphs: a cut network whose number types are those that TensorRT is to calculate in.

TensorRT 11 has no precision flags and 10 needs none: each operation runs in the type of its inputs.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from fpn_engine.errors import ModelError
from fpn_export.tensorrt.quantized_graph import check_quantized, is_quantized

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
HALF_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
BF16_OPSET = 22  # the first whose Conv and MaxPool take bfloat16
# Inputs that are float32 whatever the operator calculates in.
ALWAYS_FLOAT = {"Resize": (1, 2)}  # roi, scales
# A layer of a network; whatever stands between the last one and an output only moves numbers.
LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
RESULTS = ("objectness", "deltas", "class_logits", "box_deltas", "scores_", "window_masks")
LARGEST_HALF = float(np.finfo(np.float16).max)


def type_graph(network: ModelProto, precision: str) -> ModelProto:
    """The network in the types of ``precision``; the given one is left as it is.

    fp32, int8 and fp8: float32 between the operations; int8 and fp8 take what stands between QuantizeLinear and
    DequantizeLinear. fp16 and bf16: weights, activations, features and RoI features are of that type, ``image`` and
    all of ``RESULTS`` float32. In bf16 the layers that make the results run in float32 too, since results of 8 bits
    would be tied where they differ.

    Raises: ModelError for a precision that the graph does not fit, with what to do.
    """
    if precision in ("int8", "fp8"):
        return check_quantized(network, precision)
    if is_quantized(network):
        raise ModelError(f"the model is quantised, which does not go with {precision}; take --precision int8 or fp8")
    if precision == "fp32":
        return _copy(network)
    if precision == "bf16":
        network = version_converter.convert_version(network, max(BF16_OPSET, _opset(network)))
    return _Halving(_copy(network), precision).run()


class _Halving:
    """One pass over a graph in the order of its nodes."""

    def __init__(self, model: ModelProto, precision: str) -> None:
        self._model, self._graph = model, model.graph
        self._half = HALF_TYPES[precision]
        self._weights = {tensor.name: tensor for tensor in self._graph.initializer}
        self._types = _element_types(model)
        self._exact = _last_layers(self._graph) if precision == "bf16" else set()
        self._nodes: list[NodeProto] = []
        self._made: dict[tuple[str, int], str] = {}  # (value, type) to its name in that type

    def run(self) -> ModelProto:
        for value in self._graph.input:
            if value.name != "image":
                self._retype(value)
                self._types[value.name] = value.type.tensor_type.elem_type
        for node in self._graph.node:
            self._convert(node)
        for value in self._graph.output:
            if not value.name.startswith(RESULTS):
                self._retype(value)
            if self._types[value.name] != value.type.tensor_type.elem_type:
                self._cast_output(value)
        used = {name for node in self._nodes for name in node.input}
        kept = [tensor for tensor in self._weights.values() if tensor.name in used]
        for field, values in (("node", self._nodes), ("initializer", kept), ("value_info", [])):
            del getattr(self._graph, field)[:]
            getattr(self._graph, field).extend(values)
        onnx.checker.check_model(self._model, full_check=True)
        return self._model

    def _convert(self, node: NodeProto) -> None:
        wanted = TensorProto.FLOAT if node.output[0] in self._exact else self._half
        kept = ALWAYS_FLOAT.get(node.op_type, ())
        if node.op_type != "Shape":  # which looks at no number
            for index, name in enumerate(node.input):
                if self._is_float(name) and index not in kept:
                    node.input[index] = self._in_type(name, wanted)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = wanted
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(self._cast(attribute.t, wanted, attribute.t.name))
        for name in node.output:
            if self._is_float(name):
                self._types[name] = wanted
        self._nodes.append(node)

    def _in_type(self, name: str, wanted: int) -> str:
        """The name under which a value has the type ``wanted``, made if need be."""
        if self._types[name] == wanted:
            return name
        made = self._made.get((name, wanted))
        if made is None:
            made = self._made[name, wanted] = f"{name}.{TensorProto.DataType.Name(wanted).lower()}"
            if name in self._weights:
                self._weights[made] = self._cast(self._weights[name], wanted, made)
            else:
                self._nodes.append(helper.make_node("Cast", [name], [made], name=made, to=wanted))
            self._types[made] = wanted
        return made

    def _cast(self, tensor: TensorProto, wanted: int, name: str) -> TensorProto:
        array = numpy_helper.to_array(tensor)
        largest = float(np.abs(array).max(initial=0.0))
        if wanted == TensorProto.FLOAT16 and largest > LARGEST_HALF:
            raise ModelError(f"{tensor.name} holds {largest:.3g}, too large for fp16; take --precision bf16 or fp32")
        return numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(wanted)), name)

    def _is_float(self, name: str) -> bool:
        return self._types.get(name) in (TensorProto.FLOAT, self._half)

    def _retype(self, value: onnx.ValueInfoProto) -> None:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = self._half

    def _cast_output(self, value: onnx.ValueInfoProto) -> None:
        """Give an output the type that it is declared with: what made it leaves its name to a Cast."""
        inner = f"{value.name}.uncast"
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [inner if name == value.name else name for name in names]
        wanted = value.type.tensor_type.elem_type
        self._nodes.append(helper.make_node("Cast", [inner], [value.name], name=value.name, to=wanted))


def _last_layers(graph: GraphProto) -> set[str]:
    """First outputs of the nodes from the last layer of each result on."""
    makers = {name: node for node in graph.node for name in node.output}
    waiting = [value.name for value in graph.output if value.name.startswith(RESULTS)]
    found: set[str] = set()
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.output[0] in found:
            continue
        found.add(node.output[0])
        if node.op_type not in LAYERS:
            waiting += node.input
    return found


def _element_types(model: ModelProto) -> dict[str, int]:
    """The type of every value. Raises ModelError if one cannot be told."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    unknown = {name for node in graph.node for name in node.output if not types.get(name)}
    if unknown:
        raise ModelError(f"the type of {sorted(unknown)[0]} cannot be told; export the model again with this version")
    return types


def _opset(model: ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy
