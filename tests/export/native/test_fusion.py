"""Fusion: the same numbers from fewer operations, and nothing fused that somebody else reads."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto

from fpn_engine.backends.native.ops import RELU, Add, Conv, Linear
from fpn_export.native import fuse, lower
from tests.export.native.comparison import assert_same, kinds, make_model, node, random

X = random(2, 4, 8, 6)
MAP = ("n", 4, "h", "w")
CONSTANTS = {
    "w": random(4, 4, 3, 3) / 3,
    "v": random(4, 4, 3, 3, seed=1) / 3,
    "u": random(4, 4, 1, 1, seed=2),
    "b": random(4, seed=3),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "s": random(4, seed=4),
    "m": random(4, seed=5),
    "var": np.abs(random(4, seed=6)) + 0.2,
}
REPEAT = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def conv(source: str, weight: str, output: str, *bias: str) -> NodeProto:
    size = CONSTANTS[weight].shape[2]
    return node("Conv", source, weight, *bias, output=output, pads=[size // 2] * 4)


def norm(source: str, output: str) -> NodeProto:
    return node("BatchNormalization", source, "s", "b", "m", "var", output=output)


def test_a_residual_block() -> None:
    """He et al. 2016, fig. 2, with the norms that an exporter leaves."""
    nodes = [
        node("Relu", "x", output="r"),
        conv("r", "w", "a"),
        norm("a", "b1"),
        node("Relu", "b1", output="c"),
        conv("c", "v", "d"),
        norm("d", "e"),
        node("Add", "e", "r", output="f"),
        node("Relu", "f"),
    ]
    fused = assert_same(make_model(nodes, MAP, CONSTANTS), X)
    assert kinds(fused) == ["activate", "conv", "conv"]
    last = fused.ops[-1]
    assert isinstance(last, Conv)
    assert (last.inputs, last.activation) == (("c", "r"), RELU)


@pytest.mark.parametrize("order", [("a", "p"), ("p", "a")])
def test_a_block_with_a_projection_adds_to_the_later_convolution(order: tuple[str, str]) -> None:
    nodes = [conv("x", "w", "a"), conv("x", "u", "p", "b"), node("Add", *order, output="f"), node("Relu", "f")]
    fused = assert_same(make_model(nodes, MAP, CONSTANTS), X)
    assert kinds(fused) == ["conv", "conv"]
    assert fused.ops[-1].inputs == ("x", "a")


@pytest.mark.parametrize("order", [("l", "up"), ("up", "l")])
def test_a_lateral_with_its_top_down_addition(order: tuple[str, str]) -> None:
    """Lin et al. 2017, fig. 3: one operation."""
    nodes = [
        node("MaxPool", "x", output="p", kernel_shape=[2, 2], strides=[2, 2]),
        conv("p", "w", "coarse"),
        node("Resize", "coarse", "", "scales", output="up", **REPEAT),
        conv("x", "u", "l", "b"),
        node("Add", *order, output="merged"),
        conv("merged", "v", "y"),
    ]
    fused = assert_same(make_model(nodes, MAP, CONSTANTS), X)
    assert kinds(fused) == ["max_pool", "conv", "conv", "conv"]
    lateral = fused.ops[2]
    assert isinstance(lateral, Conv)
    assert (lateral.inputs, lateral.upsample) == (("x", "coarse"), (2, 2))


def test_a_merge_without_a_lateral_is_an_addition() -> None:
    nodes = [
        node("MaxPool", "x", output="p", kernel_shape=[2, 2], strides=[2, 2]),
        node("Resize", "p", "", "scales", output="up", **REPEAT),
        node("Add", "up", "x", output="a"),
        node("Relu", "a"),
    ]
    fused = assert_same(make_model(nodes, MAP, CONSTANTS), X)
    assert kinds(fused) == ["max_pool", "add"]
    assert isinstance(fused.ops[1], Add)
    assert fused.ops[1].upsample == (2, 2)


def test_an_upsampled_convolution_is_not_taken_for_the_fine_one() -> None:
    """up(conv(p)) + x: the convolution is the coarse operand and cannot hold the addition."""
    nodes = [
        node("MaxPool", "x", output="p", kernel_shape=[2, 2], strides=[2, 2]),
        conv("p", "w", "c"),
        node("Resize", "c", "", "scales", output="up", **REPEAT),
        node("Add", "x", "up"),
    ]
    assert kinds(assert_same(make_model(nodes, MAP, CONSTANTS), X)) == ["max_pool", "conv", "add"]


def test_what_somebody_else_reads_stays() -> None:
    nodes = [
        conv("x", "w", "a"),
        norm("a", "n"),
        node("Relu", "n", output="r"),
        node("Add", "n", "r", output="y"),
        conv("y", "v", "z"),
        node("Add", "z", "y", output="t"),
        node("Relu", "t", output="q"),
    ]
    model = make_model(nodes, MAP, CONSTANTS, outputs=["y", "a", "t", "q"])
    assert kinds(assert_same(model, X)) == ["conv", "affine", "activate", "add", "conv", "activate"]


def test_a_factor_for_each_image_is_no_residual() -> None:
    nodes = [node("GlobalAveragePool", "x", output="p"), conv("x", "w", "a"), node("Add", "a", "p")]
    assert kinds(assert_same(make_model(nodes, MAP, CONSTANTS), X)) == ["global_average_pool", "conv", "add"]


def test_an_activated_convolution_takes_no_residual() -> None:
    nodes = [conv("x", "w", "a"), node("Relu", "a", output="r"), node("Add", "r", "x")]
    assert kinds(assert_same(make_model(nodes, MAP, CONSTANTS), X)) == ["conv", "add"]


@pytest.mark.parametrize("biases", [("b", "s"), ("b",), ()])
def test_heads_of_several_levels_are_merged_and_share_their_weights(biases: tuple[str, ...]) -> None:
    """The RPN's two 1x1 convolutions on each level (sec. 4.1)."""
    nodes = [node("MaxPool", "x", output="p", kernel_shape=[2, 2], strides=[2, 2])]
    constants = CONSTANTS | {"cls": random(3, 4, 1, 1), "box": random(5, 4, 1, 1), "b": random(3), "s": random(5)}
    outputs = []
    for level in ("x", "p"):
        nodes += [conv(level, "w", f"h_{level}"), node("Relu", f"h_{level}", output=f"r_{level}")]
        for name, bias in zip(("cls", "box"), (*biases, "", "")[:2], strict=True):
            nodes.append(node("Conv", f"r_{level}", name, *([bias] * bool(bias)), output=f"{name}_{level}"))
            outputs.append(f"{name}_{level}")
    fused = assert_same(make_model(nodes, MAP, constants, outputs=outputs), X)
    assert kinds(fused) == ["max_pool", "conv", "conv", "slice", "slice", "conv", "conv", "slice", "slice"]
    assert fused.outputs == outputs
    convolutions = [op for op in fused.ops if isinstance(op, Conv)]
    assert len({op.weight for op in convolutions}) == 2, "one 3x3 and one merged 1x1 for all levels"
    assert len(fused.weights) == 2 + bool(biases)


def test_siblings_of_another_geometry_or_with_readers_stay() -> None:
    nodes = [
        node("Relu", "x", output="r"),
        node("Conv", "r", "u", output="a"),
        node("Conv", "r", "u", output="b2", strides=[2, 2]),
        node("Conv", "r", "u", output="c"),
        node("Relu", "c", output="d"),
        conv("c", "w", "e"),
    ]
    model = make_model(nodes, MAP, CONSTANTS, outputs=["a", "b2", "d", "e"])
    assert kinds(assert_same(model, X)) == ["activate", "conv", "conv", "conv", "activate", "conv"]


def test_classifier_and_box_regression_are_one_matrix() -> None:
    constants = {"f": random(8, 12), "g": random(8), "cls": random(3, 8), "box": random(5, 8)}
    nodes = [
        node("Gemm", "x", "f", "g", output="h", transB=1),
        node("Relu", "h", output="r"),
        node("Gemm", "r", "cls", output="logits", transB=1),
        node("Gemm", "r", "box", output="deltas", transB=1),
    ]
    fused = assert_same(make_model(nodes, ("r", 12), constants, outputs=["logits", "deltas"]), random(7, 12))
    assert kinds(fused) == ["linear", "linear", "slice", "slice"]
    assert isinstance(fused.ops[0], Linear)
    assert fused.ops[0].activation == RELU


def test_fusing_again_changes_nothing() -> None:
    nodes = [conv("x", "w", "a"), norm("a", "n"), node("Add", "n", "x", output="s2"), node("Relu", "s2")]
    once = fuse(lower(make_model(nodes, MAP, CONSTANTS)))
    twice = fuse(fuse(lower(make_model(nodes, MAP, CONSTANTS))))
    assert once.ops == twice.ops
    assert set(once.weights) == set(twice.weights)
