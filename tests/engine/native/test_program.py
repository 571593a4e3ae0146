"""Programs as JSON: a round trip, and every way in which they may be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fpn_engine.backends.native.ops import (
    BFLOAT16,
    FLOAT32,
    OPS,
    RELU,
    Activate,
    Activation,
    Add,
    Affine,
    AveragePool,
    Cast,
    Concat,
    Conv,
    Flatten,
    GlobalAveragePool,
    Linear,
    MaxPool,
    Mul,
    Op,
    Slice,
    Unflatten,
    Upsample,
    WindowScore,
)
from fpn_engine.backends.native.program import Program, read_program

EVERY_OP: list[Op] = [
    Conv(inputs=("x",), output="c", weight="w", bias="b", stride=(2, 1), padding=(1, 2, 3, 0), groups=2),
    Conv(inputs=("c", "c"), output="d", weight="w2", upsample=(2, 2), activation=Activation(kind="clip", high=6.0)),
    MaxPool(inputs=("d",), output="e", kernel=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    AveragePool(inputs=("e",), output="f", kernel=(2, 2), count_padding=False),
    Add(inputs=("f", "f"), output="g", activation=RELU),
    Mul(inputs=("g", "f"), output="h"),
    Affine(inputs=("h",), output="i", scale="s", shift="t"),
    Activate(inputs=("i",), output="j", activation=Activation(kind="hardswish")),
    Upsample(inputs=("j",), output="k", factor=(2, 3)),
    Concat(inputs=("k", "k", "k"), output="l"),
    GlobalAveragePool(inputs=("l",), output="m"),
    Flatten(inputs=("m",), output="n"),
    Linear(inputs=("n",), output="o", weight="v"),
    Unflatten(inputs=("o",), output="p", height=2, width=1),
    Cast(inputs=("p",), output="q", dtype=BFLOAT16),
    Slice(inputs=("q",), output="r", start=0, stop=2),
    WindowScore(inputs=("d", "e"), output="z", weight="w3", scale="s", shift="t"),
]
PROGRAM = Program(input="x", ops=tuple(EVERY_OP), outputs=("r", "e", "z"))
SHAPES = dict.fromkeys(PROGRAM.weights(), (1,))


def test_round_trip() -> None:
    assert {type(op) for op in EVERY_OP} == set(OPS)
    assert read_program(PROGRAM.to_json().encode(), SHAPES) == PROGRAM
    assert PROGRAM.dtypes()["r"] == BFLOAT16
    assert PROGRAM.dtypes()["e"] == FLOAT32


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what ``path`` of keys and indices leads to; an ellipsis takes it away."""

    def apply(values: dict[str, Any]) -> None:
        *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        at: Any = values
        for key in keys:
            at = at[key]
        if value is ...:
            del at[last]
        else:
            at[last] = value

    return apply


WRONG = {
    "format": (change("format_version", 2), "its format is 2, not 1"),
    "no outputs key": (change("outputs", ...), "has not the keys"),
    "more keys": (change("more", 1), "has not the keys"),
    "ops": (change("ops", {}), "its ops are no list"),
    "op": (change("ops.0", 3), "no operation '3'"),
    "kind": (change("ops.0.kind", "eval"), "no operation 'eval'"),
    "kind list": (change("ops.0.kind", ["conv"]), "no operation"),
    "unknown field": (change("ops.0.shell", "x"), "conv has no 'shell'"),
    "missing field": (change("ops.0.weight", ...), "conv is incomplete"),
    "stride number": (change("ops.0.stride", 2), "conv.stride is no list"),
    "stride of one": (change("ops.0.stride", [2]), "conv.stride has 1 numbers"),
    "stride zero": (change("ops.0.stride", [0, 1]), "conv.stride is 0"),
    "stride text": (change("ops.0.stride", ["1", 1]), "conv.stride is '1'"),
    "padding below zero": (change("ops.0.padding", [0, 0, -1, 0]), "conv.padding is -1"),
    "groups huge": (change("ops.0.groups", 1 << 40), "conv.groups is"),
    "groups true": (change("ops.0.groups", True), "conv.groups is 'True'"),
    "weight number": (change("ops.0.weight", 3), "conv.weight is '3'"),
    "weight empty": (change("ops.0.weight", ""), "conv.weight is ''"),
    "tensor not there": (change("ops.0.weight", "other"), "the tensor other is missing"),
    "tensor unused": (change("ops.0.bias", None), "the tensor b is not used"),
    "activation text": (change("ops.1.activation", "relu"), "conv.activation is 'relu'"),
    "activation kind": (change("ops.1.activation.kind", "gelu"), "an activation is one of"),
    "bound infinite": (change("ops.1.activation.high", float("inf")), "activation.high is inf"),
    "bound text": (change("ops.1.activation.high", "6"), "activation.high is '6'"),
    "count_padding": (change("ops.3.count_padding", 0), "average_pool.count_padding is '0'"),
    "dtype": (change("ops.14.dtype", "float64"), "a number type is one of"),
    "input dtype": (change("input_dtype", "int8"), "a number type is one of"),
    "three inputs": (change("ops.0.inputs", ["x", "x", "x"]), "conv has 3 inputs"),
    "no inputs": (change("ops.0.inputs", []), "conv has 0 inputs"),
    "read before": (change("ops.0.inputs", ["d"]), "conv c reads d, which is not made before it"),
    "made twice": (change("ops.1.output", "c"), "c is made twice"),
    "input made": (change("ops.1.output", "x"), "x is made twice"),
    "output missing": (change("outputs", ["zzz"]), "the output zzz is not made"),
    "output is the input": (change("outputs", ["x"]), "the output x is not made"),
    "no outputs": (change("outputs", []), "at least one"),
    "outputs twice": (change("outputs", ["r", "r"]), "distinct"),
    "slice read": (change("ops.15.output", "slice"), "the output r is not made"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str) -> None:
    alter, message = WRONG[case]
    values = json.loads(PROGRAM.to_json())
    alter(values)
    with pytest.raises(ValueError, match=r".") as caught:
        read_program(json.dumps(values).encode(), SHAPES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"[]"])
def test_what_is_no_json(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not JSON|not the keys"):
        read_program(data, {})


def test_a_slice_is_read_by_nobody() -> None:
    ops = (Slice(inputs=("x",), output="s", start=0, stop=1), Activate(inputs=("s",), output="y", activation=RELU))
    with pytest.raises(ValueError, match="activate y reads the slice s"):
        Program(input="x", ops=ops, outputs=("y",))


def test_number_types_are_not_mixed() -> None:
    ops = (Cast(inputs=("x",), output="y", dtype=BFLOAT16), Add(inputs=("x", "y"), output="z"))
    with pytest.raises(ValueError, match="add z mixes bfloat16 and float32"):
        Program(input="x", ops=ops, outputs=("z",))
