"""Q/DQ graphs: sound ONNX, what TensorRT's parser documents, and ONNX Runtime's integers for the same numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from fpn_engine.errors import ModelError, OptionError
from fpn_export.onnx_cut import cut_head, cut_trunk, extract
from fpn_export.quantization.integers import use_integers
from fpn_export.quantization.layers import Network, select_layers
from fpn_export.quantization.pairs import insert_pairs, takes_precision
from fpn_export.tensorrt.typed_graph import type_graph
from tests.export.quantization.conftest import SPEC
from tests.tensorrt.parser_operators import find_undocumented

Make = Callable[[str], ModelProto]
WIDTH = SPEC.fpn_channels * 49


def count(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run(model: ModelProto, *, optimise: bool = False, **given: np.ndarray) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, given)


def random_image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 3, 64, 96), np.float32)


def parts(model: ModelProto) -> dict[str, ModelProto]:
    return {"trunk": cut_trunk(model, SPEC), "head": cut_head(model, SPEC)}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_file_is_sound_and_for_the_parser(pairs: Make, precision: str) -> None:
    made = pairs(precision)
    onnx.checker.check_model(made, full_check=True)
    for part in parts(made).values():
        assert find_undocumented(type_graph(part, precision)) == []


def test_weights_are_stored_in_8_bits_and_biases_in_float(model: ModelProto, pairs: Make) -> None:
    made = pairs("int8")
    kinds = Counter(tensor.data_type for tensor in made.graph.initializer if len(tensor.dims) == 4)
    assert kinds[TensorProto.INT8] > 20
    assert made.ByteSize() < 0.3 * model.ByteSize()
    assert all(tensor.data_type != TensorProto.INT32 for tensor in made.graph.initializer)
    zeros = [numpy_helper.to_array(t) for t in made.graph.initializer if "zero_point" in t.name]
    assert zeros
    assert not any(np.any(zero) for zero in zeros)


def test_last_layers_stay_float(layers: list[str]) -> None:
    assert not [name for name in layers if name.endswith(("cls_logits", "bbox_pred", "cls_score"))]
    assert "rpn.head.conv.0.0" in layers
    assert "roi_heads.box_head.fc6" in layers


def test_nothing_quantised_is_the_same_file(model: ModelProto) -> None:
    made = insert_pairs(model, [], {})
    assert count(made) == count(model)


def test_one_layer_alone(model: ModelProto, layers: list[str]) -> None:
    network = Network(model)
    chosen = [layer for layer in network.layers if layer.name == "backbone.body.layer2.0.conv1"]
    points = network.points(chosen)
    made = insert_pairs(model, {chosen[0].name}, dict.fromkeys(points, 3.0))
    assert count(made)["QuantizeLinear"] == len(points) == 2  # what it reads, and what its ReLU gives
    assert count(made)["DequantizeLinear"] == 3
    assert set(layers) > {chosen[0].name}


def test_levels_that_were_moved_share_a_scale(model: ModelProto, layers: list[str]) -> None:
    """p6 is every second cell of p5."""
    network = Network(model)
    sources = network.sources(network.points(network.layers))
    assert sources["p6"] == "p5"
    made = insert_pairs(model, layers, dict.fromkeys(sources, 4.0) | {"p6": 1.0})
    scales = {
        t.name: float(numpy_helper.to_array(t))
        for t in made.graph.initializer
        if t.name.endswith(".scale") and not t.dims
    }
    assert scales["p6.scale"] == scales["p5.scale"] == pytest.approx(4 / 127)


def test_all_layers_become_integer_operators(pairs: Make, layers: list[str]) -> None:
    trunk, head = (use_integers(part) for part in parts(pairs("int8")).values())
    onnx.checker.check_model(ModelProto.FromString(trunk.SerializeToString()))
    convolutions = sum("fc" not in name for name in layers) + 4  # the RPN's is run on five levels
    assert count(trunk)["QLinearConv"] == convolutions
    assert count(trunk)["QLinearAdd"] == 8 + 3
    assert count(trunk)["QuantizeLinear"] == 1  # the image
    assert count(trunk)["Relu"] == count(trunk)["Add"] == 0
    assert count(head)["QGemm"] == 2
    assert count(head)["QuantizeLinear"] == 1


def test_onnx_runtime_keeps_them(pairs: Make, tmp_path: Any) -> None:
    """What runs after its own optimisation: no quantised layer has gone back to float."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    trunk = use_integers(cut_trunk(pairs("int8"), SPEC))
    ort.InferenceSession(trunk.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kept = count(onnx.load(options.optimized_model_filepath))
    assert kept["QLinearConv"] == count(trunk)["QLinearConv"]
    assert kept["QuantizeLinear"] == 1


def test_integers_give_the_same_numbers(pairs: Make) -> None:
    """Up to single steps where float rounding decides a half, which later layers carry on."""
    made = pairs("int8")
    rows = np.random.default_rng(1).standard_normal((30, WIDTH), np.float32)
    for name, given in (("trunk", {"image": random_image()}), ("head", {"roi_rows": rows})):
        part = parts(made)[name]
        for ours, exact in zip(run(use_integers(part), optimise=True, **given), run(part, **given), strict=True):
            assert np.linalg.norm(ours - exact) <= 0.02 * np.linalg.norm(exact), name


def test_integers_are_exact_on_one_layer(model: ModelProto) -> None:
    """A step apart at most, and that rarely: the bias is rounded to the sums' unit, and floats add in another order."""
    network = Network(model)
    chosen = [layer for layer in network.layers if layer.name == "backbone.body.conv1"]
    ranges = dict.fromkeys(network.points(chosen), 4.0)
    part = extract(insert_pairs(model, {chosen[0].name}, ranges), ["image"], ["trunk/max_pool2d"])
    integers = use_integers(part)
    assert count(integers) == {"QuantizeLinear": 1, "QLinearConv": 1, "Max": 1, "MaxPool": 1, "DequantizeLinear": 1}
    step = 4 / 127
    (ours,), (exact,) = run(integers, optimise=True, image=random_image()), run(part, image=random_image())
    assert np.abs(ours - exact).max() <= 1.001 * step
    assert (np.abs(ours - exact) > 0.001 * step).mean() < 0.01


def test_the_whole_file_gives_what_its_parts_give(pairs: Make) -> None:
    """p2 read from the whole file is p2 of the cut trunk."""
    made = pairs("int8")
    whole = extract(made, ["image"], ["p2", "deltas_p3"])
    p2, deltas = run(whole, image=random_image())
    cut = cut_trunk(made, SPEC)
    found = dict(zip((output.name for output in cut.graph.output), run(cut, image=random_image()), strict=True))
    np.testing.assert_array_equal(p2.transpose(0, 2, 3, 1), found["p2_nhwc"])
    np.testing.assert_array_equal(deltas.transpose(0, 2, 3, 1), found["deltas_p3_nhwc"])


def test_the_heads_first_weight_is_permuted_in_8_bits(pairs: Make) -> None:
    made = pairs("int8")
    maps = np.random.default_rng(2).standard_normal((10, SPEC.fpn_channels, 7, 7), np.float32)
    rows = maps.transpose(0, 2, 3, 1).reshape(10, -1)
    head = cut_head(made, SPEC)
    assert count(head)["Transpose"] == count(head)["Reshape"] == count(head)["Flatten"] == 0
    exact = run(extract(made, ["roi_features"], ["class_logits", "box_deltas"]), roi_features=maps)
    for ours, expected in zip(run(head, roi_rows=rows), exact, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_fp8_leaves_what_tensorrt_does_not_take(model: ModelProto) -> None:
    network = Network(model)
    refused = [layer.name for layer in network.layers if not takes_precision(network, layer, "fp8")]
    assert refused == ["backbone.body.conv1"]  # three channels, 49 cells


def test_fp8_gives_similar_numbers(pairs: Make, model: ModelProto) -> None:
    exact = run(cut_trunk(model, SPEC), image=random_image())
    for ours, expected in zip(run(cut_trunk(pairs("fp8"), SPEC), image=random_image()), exact, strict=True):
        assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > 0.8


def test_patterns_choose_layers(model: ModelProto) -> None:
    every = Network(model).layers
    assert select_layers(every, []) == set()
    assert select_layers(every, ["backbone.body.conv1"]) == {"backbone.body.conv1"}
    assert len(select_layers(every, ["backbone.fpn.*"])) == 8
    with pytest.raises(OptionError, match=r"there is no layer 'backbone\.body\.conv9'.*backbone\.body\.conv1"):
        select_layers(every, ["backbone.body.conv1", "backbone.body.conv9"])


def test_weights_that_are_not_finite_are_refused(model: ModelProto, layers: list[str]) -> None:
    broken = ModelProto.FromString(model.SerializeToString())
    tensor = next(t for t in broken.graph.initializer if t.name == "backbone.body.conv1.weight")
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(ModelError, match=r"backbone\.body\.conv1\.weight holds NaN"):
        insert_pairs(broken, layers, dict.fromkeys(Network(broken).points(Network(broken).layers), 1.0))
