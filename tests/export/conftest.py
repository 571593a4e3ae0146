"""A model that builds in no time."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from fpn_engine.spec import ModelSpec, numbered_categories
from fpn_export.onnx_graph import OnnxGraph, tensor_info
from fpn_export.onnx_network import IR_VERSION, OPSET, SPEC_KEY

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
    pooled = graph.op("Expand", graph.op("GlobalAveragePool", "p2"), graph.int64(1, 16, 7, 7), name="roi_features")
    flat = graph.op("Flatten", pooled)
    for name, width in zip(rows, (3, 12), strict=True):
        graph.op("Gemm", flat, weight(width, 16 * 49), name=name, transB=1)
    joints = _add_joints(graph)
    inputs = [tensor_info("image", TensorProto.FLOAT, ("n", 3, "h", "w"))]
    inputs.append(tensor_info("image_sizes", TensorProto.INT64, ("n", 2)))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "stand_in",
            inputs,
            [
                *(tensor_info(name, TensorProto.FLOAT, ("n", f"{name}_c", f"{name}_h", f"{name}_w")) for name in maps),
                *(tensor_info(name, TensorProto.FLOAT, ("rois", f"{name}_c")) for name in rows),
                tensor_info("roi_features", TensorProto.FLOAT, ("rois", 16, 7, 7)),
                *joints,
            ],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, {SPEC_KEY: SPEC.to_json()})
    return model


def _add_joints(graph: OnnxGraph) -> list[ValueInfoProto]:
    """What a detector has between and behind trunk and head, by name alone."""
    sizes = graph.op("Cast", "image_sizes", to=TensorProto.FLOAT)
    graph.op("Unsqueeze", graph.op("Concat", sizes, sizes, axis=1), graph.int64(1), name="proposals")
    graph.op("ReduceSum", "objectness_p2", graph.int64(2, 3), name="proposal_scores", keepdims=0)
    for name in ("roi_slots", "roi_images"):
        graph.op("ReduceSum", "image_sizes", graph.int64(1), name=name, keepdims=0)
    graph.op("ReduceSum", "p2", graph.int64(1, 2, 3), name="map_check", keepdims=0)
    graph.op("Identity", "box_deltas", name="boxes")
    graph.op("Identity", "class_logits", name="scores")
    graph.op("ArgMax", "class_logits", name="labels", axis=1, keepdims=0)
    graph.op("Add", "roi_slots", "roi_images", name="counts")
    graph.op("Cast", graph.op("IsNaN", "map_check"), name="status", to=TensorProto.INT64)
    whole, real = TensorProto.INT64, TensorProto.FLOAT
    forms = {
        "proposals": (real, ("n", 1, 4)),
        "proposal_scores": (real, ("n", 3)),
        "roi_slots": (whole, ("n",)),
        "roi_images": (whole, ("n",)),
        "map_check": (real, ("n",)),
        "boxes": (real, ("rois", 12)),
        "scores": (real, ("rois", 3)),
        "labels": (whole, ("rois",)),
        "counts": (whole, ("n",)),
        "status": (whole, ("n",)),
    }
    return [tensor_info(name, kind, shape) for name, (kind, shape) in forms.items()]
