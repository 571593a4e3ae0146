"""A model that builds in no time."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.onnx_export import IR_VERSION, OPSET, SPEC_KEY
from fpn_export.onnx_graph import OnnxGraph, tensor_info

SPEC = ModelSpec(categories=numbered_categories(2), arch="resnet18", fpn_channels=16)


@pytest.fixture(scope="session")
def stand_in() -> ModelProto:
    """The names of a detector around a few convolutions: it builds in no time, where only the process matters."""
    generator = np.random.default_rng(0)
    graph = OnnxGraph("")

    def weight(*shape: int) -> str:
        return graph.const(generator.standard_normal(shape, np.float32))

    maps, rows = ["p2"], ["class_logits", "box_deltas"]
    graph.op("Conv", "image", weight(16, 3, 3, 3), name="p2", pads=[1] * 4)
    for level in SPEC.levels:
        if level > 2:
            maps.append(graph.op("MaxPool", f"p{level - 1}", name=f"p{level}", kernel_shape=[1, 1], strides=[2, 2]))
        maps.append(graph.op("Conv", f"p{level}", weight(3, 16, 1, 1), name=f"objectness_p{level}"))
        maps.append(graph.op("Conv", f"p{level}", weight(12, 16, 1, 1), name=f"deltas_p{level}"))
    flat = graph.op("Flatten", "roi_features")
    for name, width in zip(rows, (3, 12), strict=True):
        graph.op("Gemm", flat, weight(width, 16 * 49), name=name, transB=1)
    inputs = [("image", ("n", 3, "h", "w")), ("roi_features", ("rois", 16, 7, 7))]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "stand_in",
            [tensor_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
            [
                *(tensor_info(name, TensorProto.FLOAT, ("n", f"{name}_c", f"{name}_h", f"{name}_w")) for name in maps),
                *(tensor_info(name, TensorProto.FLOAT, ("rois", f"{name}_c")) for name in rows),
            ],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, {SPEC_KEY: SPEC.to_json()})
    return model
