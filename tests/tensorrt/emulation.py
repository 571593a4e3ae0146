"""bfloat16 on ONNX Runtime, which has no kernels for it: float32 with a rounding after every operation."""

from __future__ import annotations

import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

BF16 = TensorProto.BFLOAT16


def emulate_bf16(model: ModelProto) -> ModelProto:
    """A model in float32 that rounds to bfloat16 wherever the given one does; without bfloat16 the same again.

    Inputs and outputs of bfloat16 become float32. Products are summed in float32, as tensor cores do.
    """
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    rounded = {value.name for value in values if value.type.tensor_type.elem_type == BF16}
    emulated = ModelProto()
    emulated.CopyFrom(model)
    graph = emulated.graph
    nodes = []
    for value in graph.input:
        if value.name in rounded:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == BF16:
                attribute.i = TensorProto.FLOAT
        names = [name for name in node.output if name in rounded]
        node.output[:] = [f"{name}.exact" if name in rounded else name for name in node.output]
        nodes.append(node)
        for name in names:
            nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.rounded"], to=BF16))
            nodes.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        if tensor.data_type == BF16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    for value in graph.output:
        if value.name in rounded:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    if rounded:  # all that newer opsets brought are types; ONNX Runtime has float32 kernels for the older ones too
        onnx.checker.check_model(emulated, full_check=True)
    return emulated
