"""Operator by operator against ONNX Runtime, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import NodeProto

from fpn_engine.errors import ModelError
from fpn_export.native import lower
from tests.export.native.comparison import Array, assert_same, kinds, make_model, node, random, run_network, run_ort

X = random(2, 6, 13, 10)
MAP = ("n", 6, "h", "w")


@pytest.mark.parametrize(
    ("out", "per_group", "kernel", "attributes"),
    [
        (5, 6, (3, 3), {"pads": [1, 1, 1, 1]}),
        (5, 6, (1, 1), {}),
        (5, 6, (1, 1), {"strides": [2, 2]}),
        (5, 6, (7, 7), {"pads": [3, 3, 3, 3], "strides": [2, 2]}),
        (4, 3, (3, 3), {"pads": [1, 1, 1, 1], "group": 2}),
        (6, 1, (3, 3), {"pads": [1, 1, 1, 1], "group": 6, "strides": [2, 2]}),
        (12, 1, (5, 5), {"pads": [2, 2, 2, 2], "group": 6}),
        (5, 6, (3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
        (5, 6, (3, 2), {"pads": [2, 1, 4, 2], "dilations": [2, 1], "strides": [1, 3]}),
        (5, 6, (3, 3), {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
        (5, 6, (2, 2), {"pads": [1, 0, 0, 1]}),
        (1, 6, (3, 3), {"auto_pad": "VALID"}),
        (5, 6, (4, 3), {"auto_pad": "SAME_UPPER"}),
        (5, 6, (4, 3), {"auto_pad": "SAME_LOWER"}),
    ],
)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_conv(out: int, per_group: int, kernel: tuple[int, int], attributes: dict[str, Any], biased: bool) -> None:
    constants = {"w": random(out, per_group, *kernel, seed=1), "b": random(out, seed=2)}
    inputs = ("x", "w", "b") if biased else ("x", "w")
    model = make_model([node("Conv", *inputs, **attributes)], MAP, constants)
    assert_same(model, X, random(1, 6, 9, 16, seed=3))


def test_conv_on_one_channel_and_one_cell() -> None:
    model = make_model([node("Conv", "x", "w", pads=[1] * 4)], ("n", 1, "h", "w"), {"w": random(3, 1, 3, 3)})
    assert_same(model, random(2, 1, 1, 1), random(1, 1, 5, 1), random(1, 1, 6, 7))


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [1, 1], "strides": [2, 2]},
        {"kernel_shape": [1, 1]},
        {"kernel_shape": [2, 3]},
        {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1], "strides": [2, 2]},
        {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 3], "dilations": [2, 2], "pads": [2, 2, 2, 2]},
    ],
)
def test_max_pool(attributes: dict[str, Any]) -> None:
    assert_same(make_model([node("MaxPool", "x", **attributes)], MAP), X, -np.abs(X))


@pytest.mark.parametrize("counts", [0, 1])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_average_pool(counts: int, pads: list[int]) -> None:
    attributes = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": pads, "count_include_pad": counts}
    assert_same(make_model([node("AveragePool", "x", **attributes)], MAP), X)


def test_average_pool_counts_uneven_padding() -> None:
    attributes = {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1}
    assert_same(make_model([node("AveragePool", "x", **attributes)], MAP), X)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_mean_over_a_map(keepdims: int, axes: list[int]) -> None:
    model = make_model([node("ReduceMean", "x", "axes", keepdims=keepdims)], MAP, {"axes": np.array(axes)})
    assert_same(model, X)
    assert_same(make_model([node("ReduceMean", "x", axes=axes, keepdims=keepdims)], MAP, opset=13), X)
    assert_same(make_model([node("GlobalAveragePool", "x")], MAP), X)


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes"),
    [
        ("Relu", ["x"], {}),
        ("Sigmoid", ["x"], {}),
        ("HardSwish", ["x"], {}),
        ("HardSigmoid", ["x"], {}),
        ("HardSigmoid", ["x"], {"alpha": 1 / 6, "beta": 0.5}),
        ("Clip", ["x"], {}),
        ("Clip", ["x", "low"], {}),
        ("Clip", ["x", "", "high"], {}),
        ("Clip", ["x", "low", "high"], {}),
        ("Identity", ["x"], {}),
        ("Dropout", ["x"], {}),
    ],
)
def test_elementwise(kind: str, inputs: list[str], attributes: dict[str, Any]) -> None:
    nodes = [node("Conv", "x", "w", output="c"), node(kind, "c", *inputs[1:], **attributes)]
    constants = {
        "w": random(6, 6, 1, 1, seed=4) * 3,
        "low": np.array(-0.3, np.float32),
        "high": np.array(0.7, np.float32),
    }
    fused = assert_same(make_model(nodes, MAP, constants), X)
    assert kinds(fused) == ["conv"]
    if kind not in ("Identity", "Dropout"):  # alone there is nothing to run
        assert_same(make_model([node(kind, *inputs, **attributes)], MAP, constants), X * 5)


def test_clip_of_an_old_opset_has_its_bounds_as_attributes() -> None:
    assert_same(make_model([node("Clip", "x", min=0.0, max=0.5)], MAP, opset=9), X)


def test_batch_normalization() -> None:
    constants = {"s": random(6), "b": random(6, seed=1), "m": random(6, seed=2), "v": np.abs(random(6, seed=3)) + 0.1}
    norm = node("BatchNormalization", "x", "s", "b", "m", "v", epsilon=1e-3)
    assert kinds(assert_same(make_model([norm], MAP, constants), X)) == ["affine"]
    constants["w"] = random(6, 6, 3, 3, seed=4)
    norm = node("BatchNormalization", "c", "s", "b", "m", "v", epsilon=1e-3)
    for inputs in (("x", "w"), ("x", "w", "b")):
        fused = assert_same(make_model([node("Conv", *inputs, output="c"), norm], MAP, constants), X)
        assert kinds(fused) == ["conv"]


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("constant", [np.float32(2.5), random(1, 6, 1, 1, seed=8), random(6, 1, 1, seed=9)])
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_arithmetic_with_a_constant(kind: str, constant: Array, swapped: bool) -> None:
    inputs = ("k", "x") if swapped else ("x", "k")
    model = make_model([node(kind, *inputs)], MAP, {"k": constant})
    if kind == "Div" and swapped:
        refuse(model, "Div of a constant by a computed value")
    else:
        assert_same(model, X)


@pytest.mark.parametrize("kind", ["Add", "Mul"])
@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("a", "a"), ("a", "p"), ("p", "a"), ("p", "p")])
def test_arithmetic_of_two_values(kind: str, order: tuple[str, str]) -> None:
    """p is one number per channel and image, as in squeeze and excitation."""
    nodes = [
        node("Relu", "x", output="a"),
        node("Sigmoid", "x", output="b"),
        node("GlobalAveragePool", "x", output="p"),
        node(kind, *order),
    ]
    assert_same(make_model(nodes, MAP), X)


def squeeze_and_excite(project: list[NodeProto]) -> list[NodeProto]:
    return [
        node("Relu", "x", output="a"),
        node("GlobalAveragePool", "a", output="p"),
        *project,
        node("Mul", "e", "a"),
    ]


def test_squeeze_and_excitation() -> None:
    """By 1x1 convolutions, and by matrices between reshapes (Hu et al. 2018)."""
    constants = {
        "w1": random(3, 6, 1, 1),
        "w2": random(6, 3, 1, 1, seed=1),
        "m1": random(3, 6),
        "m2": random(6, 3, seed=1),
        "shape": np.array([-1, 6, 1, 1]),
        "axes": np.array([2, 3]),
    }
    convolutions = [
        node("Conv", "p", "w1", output="q"),
        node("Relu", "q", output="r"),
        node("Conv", "r", "w2", output="s"),
        node("HardSigmoid", "s", output="e"),
    ]
    for flatten in (node("Flatten", "p", output="f"), node("Squeeze", "p", "axes", output="f")):
        matrices = [
            flatten,
            node("Gemm", "f", "m1", output="q", transB=1),
            node("Relu", "q", output="r"),
            node("Gemm", "r", "m2", output="s", transB=1),
            node("Sigmoid", "s", output="t"),
            node("Reshape", "t", "shape", output="e"),
        ]
        for project in (convolutions, matrices):
            assert_same(make_model(squeeze_and_excite(project), MAP, constants), X)


RULES = [
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("half_pixel", "round_prefer_ceil"),
    ("pytorch_half_pixel", "round_prefer_floor"),
]


@pytest.mark.parametrize(("coordinates", "rounding"), RULES)
@pytest.mark.parametrize("scale", [(2, 2), (3, 1), (4, 5)])
def test_resize_by_constant_scales(coordinates: str, rounding: str, scale: tuple[int, int]) -> None:
    rule = {"coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    model = make_model(
        [node("Resize", "x", "", "scales", **rule)], MAP, {"scales": np.array([1, 1, *scale], np.float32)}
    )
    assert kinds(assert_same(model, X)) == ["upsample"]


@pytest.mark.parametrize(
    ("coordinates", "rounding"),
    [("half_pixel", "floor"), ("asymmetric", "ceil"), ("align_corners", "floor"), ("half_pixel", "ceil")],
)
def test_rules_that_do_not_repeat_each_cell_are_refused(coordinates: str, rounding: str) -> None:
    rule = {"coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    scales = {"scales": np.array([1, 1, 2, 2], np.float32)}
    model = make_model([node("Resize", "x", "", "scales", **rule)], MAP, scales)
    refuse(model, "Resize by a rule that does not repeat each cell")


def test_resize_to_the_size_of_another_map() -> None:
    """As exporters write ``interpolate(x, size=y.shape[-2:])``: shapes, slices, concatenations."""
    nodes = [
        node("MaxPool", "x", output="p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", "x", output="shape"),
        node("Slice", "shape", "two", "four", output="hw"),
        node("Shape", "p", output="small"),
        node("Slice", "small", "zero", "two", output="nc"),
        node("Concat", "nc", "hw", output="size", axis=0),
        node("Resize", "p", "", "", "size", output="up", coordinate_transformation_mode="asymmetric",
             nearest_mode="floor"),
        node("Add", "x", "up"),
    ]  # fmt: skip
    numbers = {name: np.array([value]) for name, value in (("zero", 0), ("two", 2), ("four", 4))}
    fused = assert_same(make_model(nodes, MAP, numbers), random(2, 6, 12, 10))
    assert kinds(fused) == ["max_pool", "add"]
    crop = [node("Resize", "x", "", "", "size"), numbers | {"size": np.array([1, 6, 64, 64])}]
    refuse(make_model([crop[0]], MAP, crop[1]), "to a size that is not the same multiple of every input's")


def test_what_resize_cannot_do() -> None:
    scales = {"scales": np.array([1, 1, 2, 2], np.float32), "down": np.array([1, 1, 0.5, 0.5], np.float32)}
    refuse(make_model([node("Resize", "x", "", "scales", mode="linear")], MAP, scales), "Resize of mode linear")
    rule = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    refuse(make_model([node("Resize", "x", "", "down", **rule)], MAP, scales), "Resize by 1, 1, 0.5, 0.5")


def test_concat() -> None:
    nodes = [node("Relu", "x", output="a"), node("Sigmoid", "x", output="b"), node("Concat", "a", "x", "b", axis=1)]
    assert_same(make_model(nodes, MAP), X)
    refuse(make_model([node("Relu", "x", output="a"), node("Concat", "a", "x", axis=2)], MAP), "along anything but")


@pytest.mark.parametrize("flatten", ["Flatten", "Reshape", "computed"])
def test_a_matrix_on_a_flattened_map(flatten: str) -> None:
    """ONNX has its columns as C, H, W; computed is what torch writes for ``flatten(1)``."""
    constants = {"w": random(4, 6 * 3 * 5), "b": random(4, seed=1), "shape": np.array([0, -1]), "k": np.array([90])}
    nodes = {
        "Flatten": [node("Flatten", "x", output="f")],
        "Reshape": [node("Reshape", "x", "shape", output="f")],
        "computed": [
            node("Shape", "x", output="n", start=0, end=1),
            node("Concat", "n", "k", output="size", axis=0),
            node("Reshape", "x", "size", output="f"),
        ],
    }[flatten]
    gemm = node("Gemm", "f", "w", "b", output="g", transB=1, alpha=0.5, beta=2.0)
    fused = assert_same(make_model([*nodes, gemm, node("Relu", "g")], ("n", 6, 3, 5), constants), random(2, 6, 3, 5))
    assert kinds(fused) == ["flatten", "linear"]


def test_matrices() -> None:
    constants = {"w": random(7, 4), "v": random(4, 7), "b": random(1, 4), "one": random(4)}
    rows = ("r", 7)
    x = random(5, 7)
    assert_same(make_model([node("Gemm", "x", "w", "b")], rows, constants), x)
    assert_same(make_model([node("Gemm", "x", "v", transB=1)], rows, constants), x)
    bias = [node("MatMul", "x", "w", output="m"), node("Add", "m", "one")]
    assert kinds(assert_same(make_model(bias, rows, constants), x)) == ["linear"]
    refuse(make_model([node("Gemm", "x", "w", transA=1)], (7, 7), constants), "Gemm of a transposed matrix")


def test_transposed_and_back() -> None:
    constants = {"shape": np.array([-1, 3, 5, 6]), "w": random(4, 6, 3, 3)}
    nodes = [
        node("Reshape", "x", "shape", output="a"),
        node("Transpose", "a", output="b", perm=[0, 3, 1, 2]),
        node("Conv", "b", "w", output="c"),
        node("Transpose", "c", perm=[0, 2, 3, 1]),
    ]
    model = make_model(nodes, ("r", 90), constants)
    x = random(2, 90)
    (output,), (expected,) = run_network(lower(model), x), run_ort(model, x)
    np.testing.assert_allclose(output.numpy(), expected, rtol=0, atol=1e-4)
    assert kinds(lower(model)) == ["unflatten", "conv"]


def test_constants_are_folded() -> None:
    """Weights by way of nodes of their own, as some exporters leave them."""
    nodes = [
        node("Constant", output="s", value_float=3.0),
        node("Mul", "v", "s", output="scaled"),
        node("Transpose", "scaled", output="w", perm=[1, 0, 2, 3]),
        node("Identity", "w", output="w2"),
        node("Conv", "x", "w2"),
    ]
    assert kinds(assert_same(make_model(nodes, MAP, {"v": random(6, 4, 1, 1)}), X)) == ["conv"]


def test_what_no_output_needs_is_left_out() -> None:
    nodes = [node("Relu", "x"), node("LSTM", "x", "x", "x", output="z"), node("Relu", "x", output="v")]
    assert kinds(lower(make_model(nodes, MAP))) == ["activate"]


def refuse(model: Any, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        lower(model)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in (*words, "build with --backend onnxruntime"):
        assert word in sentence


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("Softmax", "x")], "does not have the operator Softmax (y)"),
        ([node("MaxPool", "x", kernel_shape=[3, 3], ceil_mode=1)], "MaxPool with ceil_mode"),
        ([node("AveragePool", "x", kernel_shape=[3, 3], ceil_mode=1)], "AveragePool with ceil_mode"),
        ([node("AveragePool", "x", kernel_shape=[2, 2], pads=[0, 0, 1, 1])], "uneven padding"),
        ([node("Conv", "x", "x")], "Conv with computed parameters"),
        ([node("Conv", "x", "w", auto_pad="SAME_UPPER", strides=[2, 2])], "auto_pad SAME_UPPER and a stride"),
        ([node("Relu", "x", output="a"), node("Sub", "x", "a")], "Sub of two computed values"),
        ([node("ReduceMean", "x", "one")], "ReduceMean over the axes [1]"),
        ([node("Transpose", "x", perm=[0, 1, 3, 2])], "Transpose by [0, 1, 3, 2]"),
        ([node("Flatten", "x")], "of a map whose size changes with the input's"),
        ([node("Add", "x", "wide")], "not one number per channel"),
        ([node("Cast", "x", to=7)], "Cast to another type"),
    ],
)
def test_what_is_not_there_is_named(nodes: list[NodeProto], message: str) -> None:
    constants = {"w": random(4, 6, 3, 3), "one": np.array([1]), "wide": random(1, 1, 1, 10)}
    refuse(make_model(nodes, MAP, constants), message)


def test_networks_of_other_inputs() -> None:
    refuse_input = make_model([node("Relu", "x")], ("n", 3, 4, 5, 6))
    with pytest.raises(ModelError, match=r"\(N, C, H, W\) or \(R, F\)"):
        lower(refuse_input)
    two = make_model([node("Add", "x", "z")], MAP)
    two.graph.input.append(two.graph.input[0])
    two.graph.input[1].name = "z"
    with pytest.raises(ModelError, match="of one input, not of 2"):
        lower(two)
    with pytest.raises(ModelError, match="the output x of the network is not computed"):
        lower(make_model([node("Relu", "x")], MAP, outputs=["y", "x"]))
