"""bfloat16: which layers run in it, which tensors are stored in it, and how far the results are off."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fpn_engine.backends.native.cpu_convolution import has_bfloat16
from fpn_engine.backends.native.ops import BFLOAT16, FLOAT32
from fpn_export.native import fuse, in_bfloat16, in_float32, lower
from tests.export.native.comparison import make_model, node, random, run_ort, run_program

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this processor does not convolve in bfloat16")
ERROR = 2.0**-6  # of the largest magnitude, after a few layers that each round to 2^-9
MAP = ("n", 3, "h", "w")
CONSTANTS = {
    "w": random(8, 3, 3, 3) / 5,
    "v": random(8, 8, 3, 3, seed=1) / 8,
    "cls": random(2, 8, 1, 1, seed=2),
    "box": random(3, 8, 1, 1, seed=3),
    "b": random(2, seed=4),
}
NODES = [
    node("Conv", "x", "w", output="a", pads=[1] * 4),
    node("Relu", "a", output="p"),
    node("Conv", "p", "v", output="c", pads=[1] * 4),
    node("Relu", "c", output="h"),
    node("Conv", "h", "cls", "b", output="objectness"),
    node("Conv", "h", "box", output="deltas"),
]
OUTPUTS = ["p", "objectness", "deltas"]


@needs_bfloat16
def test_last_layers_are_float32() -> None:
    model = make_model(NODES, MAP, CONSTANTS, outputs=OUTPUTS)
    program, weights = in_bfloat16(fuse(lower(model)), OUTPUTS[1:])
    assert [op.KIND for op in program.ops] == ["conv", "conv", "cast", "conv", "slice", "slice"]
    assert program.input_dtype == BFLOAT16
    assert {name: program.dtypes()[name] for name in program.outputs} == {
        "p": BFLOAT16,
        "objectness": FLOAT32,
        "deltas": FLOAT32,
    }
    halves = [name for name, tensor in weights.items() if tensor.dtype == torch.bfloat16]
    assert sorted(halves) == ["v", "w"]
    x = random(2, 3, 16, 12, seed=5)
    for ours, theirs in zip(run_program(program, weights, x), run_ort(model, x), strict=True):
        error = np.abs(ours.float().permute(0, 3, 1, 2).numpy() - theirs).max()
        assert 0 < error <= ERROR * np.abs(theirs).max()


@needs_bfloat16
def test_an_output_that_others_read_is_cast() -> None:
    """No layer of its own makes it: it is computed in bfloat16 and given in float32."""
    model = make_model(NODES[:4], MAP, CONSTANTS, outputs=["p", "h"])
    program, weights = in_bfloat16(fuse(lower(model)), ["p"])
    dtypes = program.dtypes()
    assert [dtypes[name] for name in program.outputs] == [FLOAT32, BFLOAT16]
    assert [op.KIND for op in program.ops] == ["conv", "conv", "cast"]
    assert run_program(program, weights, random(1, 3, 8, 8))[0].dtype == torch.float32


def test_float32_is_as_it_was() -> None:
    network = fuse(lower(make_model(NODES, MAP, CONSTANTS, outputs=OUTPUTS)))
    program, weights = in_float32(network)
    assert program.outputs == tuple(OUTPUTS)
    assert set(weights) == set(network.weights) == set(program.weights())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_weight_of_two_precisions_is_stored_in_both() -> None:
    nodes = [
        node("Conv", "x", "k", output="a"),
        node("Conv", "a", "k", output="y"),
    ]
    model = make_model(nodes, MAP, {"k": random(3, 3, 1, 1)})
    _, weights = in_bfloat16(fuse(lower(model)), ["y"])
    assert {name: tensor.dtype for name, tensor in weights.items()} == {
        "k": torch.bfloat16,
        "k:float32": torch.float32,
    }
