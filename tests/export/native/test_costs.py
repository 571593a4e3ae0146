"""What a program costs, against the count on the ONNX graph that it was lowered from, and by hand."""

from __future__ import annotations

import pytest

from fpn_engine.backends.native.costs import Cost, count_costs
from fpn_engine.backends.native.ops import Add, Conv, Linear, MaxPool
from fpn_engine.backends.native.packing import unpack_part
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.quantized import Dequantize, Quantize, QuantizedConv
from fpn_engine.batching import Batch
from fpn_engine.floors import count_floors, has_floors
from fpn_engine.roofline import Peaks
from fpn_engine.stages import BOX_HEAD, POOLING, PREPROCESS, TRUNK
from fpn_export.onnx_cost import HEAD, count_detector
from tests.parity.subject import Subject, random_subject

SIZE = (96, 160)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return random_subject("resnet18")


@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_as_on_the_graph(batch: int, subject: Subject) -> None:
    graph = count_detector(subject.onnx_model, subject.spec, SIZE, batch=batch, itemsize=4)
    head = graph.pop(HEAD)
    rows = batch * subject.spec.rpn_post_nms_top_n_test
    width = subject.spec.feature_channels * subject.spec.box_roi_pool.output_size**2
    counted = {
        "trunk": ([cost for costs in graph.values() for cost in costs], (batch, *SIZE, 3)),
        "head": (head, (rows, width)),
    }
    for part, (expected, shape) in counted.items():
        program, weights = unpack_part(part, subject.native_plan.parts)
        costs = list(count_costs(program, shape, {name: tuple(t.shape) for name, t in weights.items()}))
        assert sum(cost.macs for cost in costs) == sum(cost.macs for cost in expected)
        moved = sum(cost.weight_bytes + cost.activation_bytes for cost in expected)
        # Fused heads read their input once instead of twice.
        assert 0.9 * moved < sum(cost.moved for cost in costs) <= moved


def test_by_hand() -> None:
    program = Program(
        input="x",
        ops=(
            Conv(inputs=("x",), output="a", weight="w", bias="b", padding=(1, 1, 1, 1)),
            MaxPool(inputs=("a",), output="p", kernel=(2, 2), stride=(2, 2)),
            Add(inputs=("a", "p"), output="s", upsample=(2, 2)),
            Conv(inputs=("s",), output="y", weight="w", bias="b", padding=(1, 1, 1, 1)),
        ),
        outputs=("y",),
    )
    weights = {"w": (4, 3, 3, 4), "b": (4,)}
    full, half, stored = 4 * 6 * 8 * 4, 4 * 3 * 4 * 4, 4 * (144 + 4)
    assert list(count_costs(program, (1, 6, 8, 4), weights)) == [
        Cost(6 * 8 * 4 * 36, 2 * full + stored),
        Cost(0, full + half),
        Cost(0, half),
        Cost(6 * 8 * 4 * 36, 2 * full),  # its weights have been read
    ]
    rows = Program(input="x", ops=(Linear(inputs=("x",), output="y", weight="w"),), outputs=("y",))
    assert list(count_costs(rows, (5, 7), {"w": (3, 7)})) == [Cost(5 * 3 * 7, 4 * (35 + 15 + 21))]


def test_8_bits_by_hand() -> None:
    """A byte for each number that is stored or handed on in 8 bits, four for scales and biases."""
    program = Program(
        input="x",
        ops=(
            Quantize(inputs=("x",), output="q", step=1.0),
            QuantizedConv(inputs=("q",), output="c", weight="w", scale="s", bias="b", step=1.0),
            Dequantize(inputs=("c",), output="y"),
        ),
        outputs=("y",),
    )
    weights = {"w": (5, 1, 1, 4), "s": (5,), "b": (5,)}
    cells = 6 * 8
    assert list(count_costs(program, (1, 6, 8, 4), weights)) == [
        Cost(0, 0),
        Cost(cells * 20, cells * (4 + 5) + 20 + 4 * 10),
        Cost(0, 0),
    ]


def test_floors_of_stages(subject: Subject) -> None:
    plan = subject.native_plan
    assert has_floors(plan.manifest)
    assert not has_floors(subject.plan.manifest)
    one, other = Batch([0], [SIZE], SIZE), Batch([1, 2], [SIZE] * 2, SIZE)
    slow, fast = (Peaks(flops=rate, bandwidth=1e30) for rate in (1e9, 2e9))
    floors = count_floors(plan, [one], slow)
    assert list(floors) == [PREPROCESS, TRUNK, POOLING, BOX_HEAD]
    assert count_floors(plan, [one], fast)[TRUNK] == pytest.approx(floors[TRUNK] / 2)
    assert count_floors(plan, [one, other], slow)[BOX_HEAD] == pytest.approx(3 * floors[BOX_HEAD])
    copying = count_floors(plan, [one], Peaks(flops=1e30, bandwidth=1e9))
    assert copying[PREPROCESS] == pytest.approx(1e3 * 3 * SIZE[0] * SIZE[1] * 5 / 1e9)
