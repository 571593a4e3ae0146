"""Q/DQ graphs lowered to operations on 8 bits: which become integers, and that the numbers are ONNX Runtime's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from onnx import ModelProto, NodeProto

from fpn_engine.backends.native.cpu_quantized import has_int8_products
from fpn_engine.backends.native.ops import RELU
from fpn_engine.backends.native.quantized import Quantize, QuantizedConv
from fpn_engine.errors import ModelError
from fpn_export.native import fuse, in_int8, lower
from fpn_export.native.network import Network
from fpn_export.onnx_cut import cut_head, cut_trunk
from fpn_export.quantization.layers import Network as Detector
from fpn_export.quantization.pairs import insert_pairs
from tests.export.native.comparison import Array, kinds, make_model, node, random, run_ort, run_program
from tests.export.quantization.conftest import SPEC, layers, model, pairs

__all__ = ["layers", "model", "pairs"]

needs_int8 = pytest.mark.skipif(not has_int8_products(), reason="this processor or torch has no int8 products")
MAP = ("n", 8, "h", "w")
RARE = 0.01  # of the numbers: float32 decides a half, or ONNX Runtime rounds an operand of an addition once more
QUANTIZED = ["quantize", "dequantize"]
WIDTH = SPEC.fpn_channels * 49
# Steps of the values of the small graphs.
STEPS = {"x": 0.03, "a": 0.06, "b": 0.05, "y": 0.07}


def make_constants() -> dict[str, Array]:
    """Weights in 8 bits with a scale for each channel."""
    rng = np.random.default_rng(0)
    found: dict[str, Array] = {"zero": np.array(0, np.int8)}
    for name, step in STEPS.items():
        found[f"{name}.step"] = np.array(step, np.float32)
    for name, shape in (("v", (8, 8, 3, 3)), ("u", (8, 8, 1, 1)), ("m", (5, 8 * 2 * 3))):
        found[f"{name}.q"] = rng.integers(-127, 128, shape).astype(np.int8)
        found[f"{name}.scale"] = np.geomspace(2e-4, 3e-3, shape[0]).astype(np.float32)
        found[f"{name}.zero"] = np.zeros(shape[0], np.int8)
    return found | {"c": random(8, seed=1), "d": random(5, seed=2), "bound": np.array(1.0, np.float32)}


def pair(source: str, name: str, step: str | None = None) -> list[NodeProto]:
    """Q and DQ behind ``source``; the value is called ``name``."""
    step = f"{step or name}.step"
    return [
        node("QuantizeLinear", source, step, "zero", output=f"{name}.q"),
        node("DequantizeLinear", f"{name}.q", step, "zero", output=name),
    ]


def weight(name: str) -> NodeProto:
    return node("DequantizeLinear", f"{name}.q", f"{name}.scale", f"{name}.zero", output=name, axis=0)


def make(nodes: list[NodeProto], shape: Sequence[int | str] = MAP, **more: Array) -> ModelProto:
    constants = make_constants() | more
    used = {name for each in nodes for name in each.input}
    return make_model(nodes, shape, {name: array for name, array in constants.items() if name in used})


CONV = [*pair("x", "x_", "x"), weight("v"), node("Conv", "x_", "v", "c", output="e", pads=[1] * 4)]
SECOND = [weight("u"), node("Conv", "x_", "u", output="f")]


def lowered(model: ModelProto) -> Network:
    network = fuse(lower(model))
    in_int8(network)
    return network


def run(model: ModelProto, x: Array, *, all_in_arena: bool = False) -> list[torch.Tensor]:
    return run_program(*in_int8(fuse(lower(model))), x, all_in_arena=all_in_arena)


def assert_same_numbers(model: ModelProto, step: float, steps_apart: int = 1) -> None:
    """As ONNX Runtime computes the file in float, ``steps_apart`` at most and that rarely."""
    for shape in ((2, 8, 12, 16), (1, 8, 30, 8)):
        x = random(*shape, seed=5)
        expected = run_ort(model, x, optimise=False)[0]
        for all_in_arena in (False, True):
            output = run(model, x, all_in_arena=all_in_arena)[0]
            ours = (output.permute(0, 3, 1, 2) if output.ndim == 4 else output).numpy()
            apart = np.abs(ours - expected) / step
            assert apart.max() <= steps_apart + 1e-3
            assert (apart > 1e-3).mean() <= RARE * steps_apart**5
            assert np.unique(ours).size > 10


@needs_int8
def test_a_layer_with_its_relu() -> None:
    made = make([*CONV, node("Relu", "e", output="r"), *pair("r", "y")])
    network = lowered(made)
    assert kinds(network) == ["quantize", "quantized_conv", "dequantize"]
    conv = network.ops[1]
    assert isinstance(conv, QuantizedConv)
    assert (conv.activation, conv.padding) == (RELU, (1, 1, 1, 1))
    assert conv.step == np.float32(STEPS["y"])
    assert {name: array.dtype.name for name, array in network.weights.items()} == {
        "v:int8": "int8",
        "v:scale": "float32",
        "c": "float32",
    }
    assert_same_numbers(made, STEPS["y"])


@needs_int8
def test_a_pair_goes_through_what_moves_numbers() -> None:
    pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
    resize = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    scales = np.array([1, 1, 2, 2], np.float32)
    nodes = [*CONV, node("MaxPool", "e", output="r", **pool), node("Resize", "r", "", "up", output="s", **resize)]
    made = make([*nodes, *pair("s", "y")], up=scales)
    assert kinds(lowered(made)) == ["quantize", "quantized_conv", "max_pool", "upsample", "dequantize"]
    assert_same_numbers(made, STEPS["y"])


@needs_int8
def test_a_second_pair_of_one_step_is_nothing() -> None:
    """As p6 has it, every second cell of p5."""
    pool = node("MaxPool", "y_", output="p", kernel_shape=[1, 1], strides=[2, 2])
    made = make([*CONV, *pair("e", "y_", "y"), pool, *pair("p", "y")])
    assert kinds(lowered(made)) == ["quantize", "quantized_conv", "max_pool", "dequantize"]
    assert_same_numbers(made, STEPS["y"])
    other = make([*CONV, *pair("e", "a_", "a"), node("Identity", "a_", output="p"), *pair("p", "y")])
    assert kinds(lowered(other)) == ["quantize", "quantized_conv", "dequantize", "quantize", "dequantize"]
    assert_same_numbers(other, STEPS["y"])


def residual(*behind: NodeProto) -> ModelProto:
    nodes = [*CONV, *SECOND, *pair("e", "a"), *pair("f", "b"), node("Add", "a", "b", output="s")]
    return make([*nodes, *(behind or pair("s", "y"))])


@needs_int8
def test_an_addition_goes_into_a_convolution() -> None:
    made = residual(node("Relu", "s", output="r"), *pair("r", "y"))
    network = lowered(made)
    assert kinds(network) == ["quantize", "quantized_conv", "quantized_conv", "dequantize"]
    last = network.ops[2]
    assert isinstance(last, QuantizedConv)
    assert (last.inputs, last.activation) == (("x_.q", "a.q"), RELU)
    # The operand "b" is not rounded by itself, which moves many sums across a half, by one step.
    assert_same_numbers(made, STEPS["y"], steps_apart=2)


@needs_int8
def test_lateral_and_top_down() -> None:
    resize = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    coarse = node("Conv", "x_", "v", "c", output="e", pads=[1] * 4, strides=[2, 2])
    nodes = [*CONV[:-1], coarse, *pair("e", "a"), node("Resize", "a", "", "up", output="t", **resize)]
    nodes += [*SECOND, *pair("f", "b"), node("Add", "b", "t", output="s"), *pair("s", "y")]
    made = make(nodes, up=np.array([1, 1, 2, 2], np.float32))
    network = lowered(made)
    assert kinds(network) == ["quantize", "quantized_conv", "quantized_conv", "dequantize"]
    assert network.ops[2].upsample == (2, 2)  # type: ignore[attr-defined]
    assert_same_numbers(made, STEPS["y"], steps_apart=2)


@needs_int8
@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        # Nothing says what the sum is rounded to.
        ([*CONV, *SECOND, *pair("e", "a"), *pair("f", "b"), node("Add", "a", "b")], ["add"]),
        # Both operands are read elsewhere too: rounded as they are.
        (
            [*CONV, *pair("e", "a"), node("Add", "a", "a", output="s"), *pair("s", "y")],
            ["add", "quantize", "dequantize"],
        ),
        # An activation that 8 bits do not have.
        ([*CONV, node("Sigmoid", "e", output="r"), *pair("r", "y")], ["conv", *QUANTIZED]),
        # The result is read as it is.
        ([*CONV, *pair("e", "a"), node("Add", "a", "e")], ["conv", "quantize", "dequantize", "add"]),
    ],
)
def test_what_does_not_fit_stays_float(nodes: list[NodeProto], expected: list[str]) -> None:
    made = make(nodes)
    assert kinds(lowered(made))[-len(expected) :] == expected
    assert_same_numbers(made, STEPS["y"], steps_apart=2)  # a step of "a" is most of one, and read twice


@needs_int8
def test_rows() -> None:
    """A flattened map: the columns of the weight are in another order here, those in 8 bits too."""
    product = node("Gemm", "f_", "m", "d", output="e", transB=1)
    nodes = [node("Flatten", "x", output="f"), *pair("f", "f_", "x"), weight("m"), product, *pair("e", "y")]
    made = make(nodes, ("n", 8, 2, 3))
    assert kinds(lowered(made)) == ["quantize", "flatten", "quantized_linear", "dequantize"]
    x = random(50, 8, 2, 3, seed=6)
    ours, theirs = run(made, x)[0].numpy(), run_ort(made, x, optimise=False)[0]
    assert np.abs(ours - theirs).max() <= 1.001 * STEPS["y"]
    assert (np.abs(ours - theirs) > 0.001 * STEPS["y"]).mean() <= RARE
    assert np.unique(ours).size > 10


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"zero": np.array(0, np.uint8)}, "QuantizeLinear to anything but int8"),
        ({"zero": np.array(3, np.int8)}, "QuantizeLinear to anything but int8"),
    ],
)
def test_other_pairs_are_refused(change: dict[str, Array], problem: str) -> None:
    with pytest.raises(ModelError, match=rf"{problem}.*--backend onnxruntime"):
        lower(make([*CONV, *pair("e", "y")], **change))


Pairs = Callable[[str], ModelProto]


def test_every_layer_of_a_detector(pairs: Pairs, layers: list[str]) -> None:
    trunk, head = (fuse(lower(cut(pairs("int8"), SPEC))) for cut in (cut_trunk, cut_head))
    for network in (trunk, head):
        in_int8(network)
    found = Counter(kinds(trunk))
    assert found["quantized_conv"] == sum("fc" not in name for name in layers) + 4  # the RPN's is run on five levels
    assert found["quantize"] == 1, "the image"
    assert found["add"] == found["upsample"] == found["affine"] == 0
    assert found["conv"] == 5, "objectness and deltas"
    assert found["dequantize"] == 4 + 5, "the levels that RoIAlign reads, and what those read"
    assert kinds(head) == ["quantize", "quantized_linear", "quantized_linear", "dequantize", "linear", "slice", "slice"]
    program, weights = in_int8(fuse(lower(cut_trunk(pairs("int8"), SPEC))))
    stored = sum(tensor.nbytes for tensor in weights.values())
    assert stored < 0.3 * sum(4 * tensor.numel() for tensor in weights.values())
    assert [op for op in program.ops if isinstance(op, Quantize)] == [program.ops[0]]


@needs_int8
def test_a_detector_gives_the_same_numbers(pairs: Pairs) -> None:
    """Up to the roundings that additions do without."""
    image = np.random.default_rng(0).standard_normal((1, 3, 64, 96), np.float32)
    rows = np.random.default_rng(1).standard_normal((30, WIDTH), np.float32)
    for cut, given, tolerance in ((cut_trunk, image, 0.1), (cut_head, rows, 1e-3)):
        part = cut(pairs("int8"), SPEC)
        for ours, exact in zip(run(part, given), run_ort(part, given, optimise=False), strict=True):
            assert np.linalg.norm(ours.numpy() - exact) <= tolerance * np.linalg.norm(exact)


@needs_int8
def test_some_layers_in_float(model: ModelProto, layers: list[str], pairs: Pairs) -> None:
    """As a sensitive model has it: a whole stage and the laterals stay float."""
    kept = {name for name in layers if "layer2" not in name and "inner" not in name}
    detector = Detector(model)
    points = detector.points([layer for layer in detector.layers if layer.name in kept])
    part = cut_trunk(insert_pairs(model, kept, dict.fromkeys(points, 4.0)), SPEC)
    found: Counter[str] = Counter(kinds(lowered(part)))
    assert found["conv"] > 5
    assert found["quantized_conv"] == sum("fc" not in name for name in kept) + 4
    image = np.random.default_rng(0).standard_normal((1, 3, 64, 96), np.float32)
    for ours, exact in zip(run(part, image), run_ort(part, image, optimise=False), strict=True):
        assert np.linalg.norm(ours.numpy() - exact) <= 0.2 * np.linalg.norm(exact)


def test_fp8_is_refused(pairs: Pairs) -> None:
    with pytest.raises(ModelError, match=r"QuantizeLinear to anything but int8.*--backend onnxruntime"):
        lower(cut_trunk(pairs("fp8"), SPEC))
