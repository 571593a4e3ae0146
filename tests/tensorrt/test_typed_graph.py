"""Strongly typed graphs: what TensorRT's parser documents and nothing else, and the same numbers within their type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fpn_engine.errors import ModelError
from fpn_export.checkpoint import load_checkpoint
from fpn_export.onnx_cut import cut_trunk
from fpn_export.onnx_export import export_onnx
from fpn_export.tensorrt.typed_graph import PRECISIONS, RESULTS, type_graph
from tests.export.random_system import make_images
from tests.tensorrt.conftest import Networks, make_networks
from tests.tensorrt.emulation import emulate_bf16
from tests.tensorrt.ort_run import open_session, run
from tests.tensorrt.parser_operators import find_undocumented
from tests.tensorrt.quantization import quantize

HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Largest difference as a part of the largest value: some units of the last place of 11 and 8 bits, through 20 layers.
TOLERANCE = {"fp16": 4e-3, "bf16": 4e-2}


def typed(network: ModelProto, precision: str) -> ModelProto:
    quantized = precision in ("int8", "fp8")
    return type_graph(quantize(network, precision) if quantized else network, precision)


def largest_error(network: ModelProto, precision: str, value: np.ndarray) -> float:
    exact = run(open_session(network), value)
    made = run(open_session(emulate_bf16(type_graph(network, precision))), value)
    assert list(made) == list(exact)
    errors = [np.abs(made[name].astype(np.float32) - exact[name]).max() / np.abs(exact[name]).max() for name in exact]
    return float(max(errors))


def element_types(values: Any) -> dict[str, int]:
    return {value.name: value.type.tensor_type.elem_type for value in values}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_what_the_parser_documents(small: Networks, precision: str) -> None:
    for network in small.parts.values():
        assert find_undocumented(typed(network, precision)) == []


@pytest.mark.parametrize("system", ["c4", "top_down"])  # a head of convolutions; no lateral connections
def test_other_systems_have_only_what_the_parser_documents(system: str) -> None:
    for network in make_networks(system).parts.values():
        for precision in PRECISIONS:
            assert find_undocumented(typed(network, precision)) == [], precision


def test_the_end_to_end_file_would_not_be_taken(small: Networks) -> None:
    found = " ".join(find_undocumented(small.model))
    for operator in ("NonMaxSuppression", "RoiAlign", "TopK"):
        assert f"{operator} " in found


def test_mixed_types_and_modes_would_be_seen(small: Networks) -> None:
    broken = type_graph(small.parts["trunk"], "fp32")
    resize = next(node for node in broken.graph.node if node.op_type == "Resize")
    next(attribute for attribute in resize.attribute if attribute.name == "mode").s = b"cubic"
    assert any("mode" in line for line in find_undocumented(broken))


@pytest.mark.parametrize("precision", HALVES)
def test_half_everywhere_but_at_the_ends(small: Networks, precision: str) -> None:
    half = HALVES[precision]
    trunk, head = (type_graph(small.parts[name], precision).graph for name in ("trunk", "head"))
    assert element_types(trunk.input) == {"image": TensorProto.FLOAT}
    assert element_types(head.input) == {"roi_rows": half}
    for name, kind in {**element_types(trunk.output), **element_types(head.output)}.items():
        assert kind == (TensorProto.FLOAT if name.startswith(RESULTS) else half), name
    assert sum(kind == half for kind in element_types(trunk.output).values()) == len(small.spec.roi_levels)
    last = ("cls_logits", "bbox_pred", "cls_score") if precision == "bf16" else ()
    for tensor in [*trunk.initializer, *head.initializer]:
        if tensor.data_type in (TensorProto.FLOAT, half) and "scales" not in tensor.name:  # a Resize takes float32
            exact = any(name in tensor.name for name in last)
            assert tensor.data_type == (TensorProto.FLOAT if exact else half), tensor.name


@pytest.mark.parametrize("precision", HALVES)
def test_halves_give_the_same_numbers(small: Networks, precision: str) -> None:
    width = small.spec.box_roi_pool.output_size**2 * small.spec.feature_channels
    rows = np.random.default_rng(1).standard_normal((40, width), np.float32)
    for name, value in (("trunk", make_images().numpy()), ("head", rows)):
        error = largest_error(small.parts[name], precision, value)
        assert 0 < error < TOLERANCE[precision], f"{name}: {error}"


@pytest.mark.shared
@pytest.mark.parametrize("precision", HALVES)
def test_halves_on_a_trained_resnet18(bccd_parts: dict[str, ModelProto], precision: str) -> None:
    images = np.random.default_rng(0).standard_normal((1, 3, 160, 192), np.float32)
    assert 0 < largest_error(bccd_parts["trunk"], precision, images) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantised_graphs_give_similar_numbers(small: Networks, precision: str) -> None:
    images = make_images().numpy()
    exact = run(open_session(small.parts["trunk"]), images)
    made = run(open_session(typed(small.parts["trunk"], precision)), images)
    for name, value in exact.items():
        assert np.corrcoef(value.ravel(), made[name].ravel())[0, 1] > 0.85, name


def test_a_bias_of_int32_becomes_float_again(small: Networks) -> None:
    quantized = quantize(small.parts["head"], "int8", int32_bias=True)
    assert any("INT32" in line for line in find_undocumented(quantized))
    made = type_graph(quantized, "int8")
    assert find_undocumented(made) == []
    rows = np.random.default_rng(1).standard_normal((5, quantized_width(small)), np.float32)
    results = run(open_session(made), rows)
    for name, value in run(open_session(quantized), rows).items():
        np.testing.assert_allclose(results[name], value, atol=2e-3 * np.abs(value).max())


def quantized_width(small: Networks) -> int:
    return small.spec.box_roi_pool.output_size**2 * small.spec.feature_channels


REFUSALS = {
    "nothing quantised": ("int8", lambda trunk: trunk, "is not quantised.*fpn-engine quantize"),
    "not asked for": ("fp16", lambda trunk: quantize(trunk, "int8"), "does not go with fp16"),
    "the other type": ("fp8", lambda trunk: quantize(trunk, "int8"), "to int8, not to fp8"),
    "unsigned": ("int8", lambda trunk: quantize(trunk, "uint8"), "to uint8, not to int8"),
    "zero point": ("int8", lambda trunk: quantize(trunk, "int8", zero_point=3), "not 0"),
}


@pytest.mark.parametrize(("precision", "change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused(small: Networks, precision: str, change: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        type_graph(change(small.parts["trunk"]), precision)


def test_a_weight_too_large_for_fp16_is_named(small: Networks) -> None:
    network = type_graph(small.parts["head"], "fp32")
    weight = next(tensor for tensor in network.graph.initializer if tensor.name.endswith("fc6.weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e8), weight.name))
    with pytest.raises(ModelError, match=r"fc6\.weight holds .* too large for fp16; take --precision bf16"):
        type_graph(network, "fp16")
    type_graph(network, "bf16")


def test_a_cast_inside_and_an_output_that_is_read_again() -> None:
    """What exporters of others write: a Cast to float, a constant in a node, an output used further on."""
    one = numpy_helper.from_array(np.ones(1, np.float32))
    nodes = [
        helper.make_node("Constant", [], ["one"], value=one),
        helper.make_node("Shape", ["image"], ["sides"]),
        helper.make_node("Cast", ["sides"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Slice", ["numbers", "first", "second"], ["count"]),
        helper.make_node("Add", ["image", "one"], ["p2"]),
        helper.make_node("Mul", ["p2", "count"], ["objectness_p2"]),
        helper.make_node("Sub", ["objectness_p2", "p2"], ["deltas_p2"]),
    ]
    numbers = {"first": 0, "second": 1}
    shape = ["n", 3, "h", "w"]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name in ("p2", "objectness_p2", "deltas_p2")
        ],
        [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    image = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).numpy()
    for precision, tolerance in TOLERANCE.items():
        made = type_graph(model, precision)
        assert find_undocumented(made) == []
        results = run(open_session(emulate_bf16(made)), image)
        for name, value in run(open_session(model), image).items():
            np.testing.assert_allclose(results[name].astype(np.float32), value, atol=tolerance * np.abs(value).max())


@pytest.fixture(scope="module")
def bccd_parts(shared_dir: Path) -> dict[str, ModelProto]:
    checkpoint = load_checkpoint(shared_dir / "checkpoints" / "bccd_r18_fpn.pth")
    exported = export_onnx(checkpoint.model, checkpoint.spec)
    return {"trunk": cut_trunk(exported, checkpoint.spec)}
