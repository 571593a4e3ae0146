"""Neural parts through torch.onnx, and finished files: what the exports of all kinds of models share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, helper, numpy_helper
from torch import Tensor, nn

import fpn_engine
from fpn_engine.errors import ModelError

OPSET = 20
IR_VERSION = 10  # what ONNX Runtime 1.22 and later read; onnx itself would write a newer one
SPEC_KEY, VERSION_KEY = "fpn_engine.spec", "fpn_engine.version"  # of the metadata
# Bounds of the symbolic sizes while exporting; not limits of the file. torch.export wants a finite range.
MAX_BATCH, MAX_CELLS = 4096, 512


def export_trunk(module: nn.Module, output_names: Sequence[str]) -> ModelProto:
    """A trunk from ``image`` (N, 3, H, W), any batch, sides multiples of 32; inner names begin with ``trunk/``."""
    batch = torch.export.Dim("batch", max=MAX_BATCH)
    h, w = (torch.export.Dim(name, max=MAX_CELLS) for name in ("h", "w"))  # in cells of C5, 32 pixels
    shapes = {"image": {0: batch, 2: 32 * h, 3: 32 * w}}
    trunk = export_part(module, torch.zeros(2, 3, 128, 192), "image", output_names, shapes)
    _upsample_by_two(trunk)
    return rename(trunk, "trunk/")


def export_part(
    module: nn.Module, example: Tensor, input_name: str, output_names: Sequence[str], dynamic_shapes: dict[str, Any]
) -> ModelProto:
    """One neural part through torch.onnx, values and parameters named without the exporter's wrapping."""
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter warns about its own internals
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[input_name],
                output_names=list(output_names),
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None  # with dynamo=True and no file the exporter returns a program
    return program.model_proto


def _upsample_by_two(trunk: ModelProto) -> None:
    """Give every Resize the constant scale 2 instead of a size computed from shapes.

    Sides are multiples of 32, so each level is exactly twice the next; runtimes fuse a constant scale.
    """
    upsamplings = [node for node in trunk.graph.node if node.op_type == "Resize"]
    if not upsamplings:
        return
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], dtype=np.float32), "upsample_scales")
    trunk.graph.initializer.append(scales)
    for node in upsamplings:
        node.input[:] = [node.input[0], "", scales.name]
    needed = {value.name for value in trunk.graph.output}
    for node in reversed(list(trunk.graph.node)):  # the sizes' computation is dead now
        if needed.isdisjoint(node.output):
            trunk.graph.node.remove(node)
        else:
            needed.update(node.input)


def rename(model: ModelProto, prefix: str) -> ModelProto:
    """Give inner values ``prefix`` and parameters their state-dict names; inputs and outputs stay."""
    fixed = {value.name for value in (*model.graph.input, *model.graph.output)}
    parameters = {tensor.name for tensor in model.graph.initializer}

    def renamed(name: str) -> str:
        if name == "" or name in fixed:
            return name
        inner = name.removeprefix("model.")
        return inner if name in parameters and inner != name else prefix + name

    for tensor in model.graph.initializer:
        tensor.name = renamed(tensor.name)
    for node in model.graph.node:
        node.name = prefix + node.name
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    return model


def finish(graph: GraphProto, properties: Mapping[str, str]) -> ModelProto:
    """The file of a graph, with ``properties`` in its metadata. Raises ModelError if ONNX's checker refuses it."""
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fpn-engine",
        producer_version=fpn_engine.__version__,
    )
    helper.set_model_props(model, {**properties, VERSION_KEY: fpn_engine.__version__})
    _strip_sources(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ModelError(f"the exported model does not pass the ONNX checker: {error}") from error
    return model


def _strip_sources(model: ModelProto) -> None:
    """Remove what the exporter notes about the machine it ran on: source paths and stack traces."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for tensor in model.graph.initializer:
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
