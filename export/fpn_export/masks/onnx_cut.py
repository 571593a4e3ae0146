"""Cutting trunk and windows' networks of a mask-proposal model out of the end-to-end file."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fpn_engine.masks.spec import MaskSpec
from fpn_export.onnx_cut import cut_maps, extract
from fpn_export.onnx_graph import tensor_info

ROWS, MASKS = "window_rows", "window_masks"


def cut_masks(model: ModelProto, spec: MaskSpec) -> dict[str, ModelProto]:
    """The networks by the names of a plan's parts.

    "trunk": ``image`` to the levels and the score logits, each NHWC as ``NAME_nhwc``. "head0" and so on:
    ``window_rows`` (R, k^2 C), cells y first, channels last, to ``window_masks`` (R, S^2) logits.
    """
    names = [*spec.level_names, *(f"scores_{level}" for level in spec.level_names)]
    heads = {name: _cut_head(model, spec, number) for number, name in enumerate(spec.head_names)}
    return {"trunk": cut_maps(model, names)} | heads


def _cut_head(model: ModelProto, spec: MaskSpec, number: int) -> ModelProto:
    rows, masks = f"{ROWS}_{number}", f"{MASKS}_{number}"
    head = _fold(extract(model, [rows], [masks]), rows)
    for node in head.graph.node:
        for names in (node.input, node.output):
            names[:] = [{rows: ROWS, masks: MASKS}.get(name, name) for name in names]
    for values, name, width in (
        (head.graph.input, ROWS, spec.heads[number].kernel ** 2 * spec.feature_channels),
        (head.graph.output, MASKS, spec.mask_size**2),
    ):
        del values[:]
        values.append(tensor_info(name, TensorProto.FLOAT, ("windows", width)))
    del head.graph.value_info[:]
    return head


def _fold(head: ModelProto, given: str) -> ModelProto:
    """What does not depend on ``given``, the weights' order, computed and stored."""
    graph = head.graph
    computed = {given}
    for node in graph.node:
        if not computed.isdisjoint(node.input):
            computed.update(node.output)
    constant = [node for node in graph.node if computed.isdisjoint(node.output)]
    read = {name for node in graph.node if node not in constant for name in node.input}
    results = sorted({name for node in constant for name in node.output} & read)
    if results:
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
        part = helper.make_graph(constant, "constants", [], outputs, graph.initializer)
        evaluator = ReferenceEvaluator(helper.make_model(part, opset_imports=head.opset_import))
        for name, value in zip(results, evaluator.run(None, {}), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        kept = [node for node in graph.node if node not in constant]
        del graph.node[:]
        graph.node.extend(kept)
    unread = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unread:
        graph.initializer.remove(tensor)
    onnx.checker.check_model(head)
    return head
