"""The memory plan: no two live values overlap, whatever the program; memory is used again."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_engine.backends.native.executor import CpuExecutor
from fpn_engine.backends.native.memory import ALIGNMENT, MemoryPlan, plan_memory
from fpn_engine.backends.native.ops import RELU, Activate, Add, Concat, Conv, Flatten, Op, Unflatten
from fpn_engine.backends.native.program import Program

CHANNELS = 3


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random graphs of operations that write in place, beside and into views; any values are outputs."""
    ops: list[Op] = []
    channels = {"x": CHANNELS}
    for number in range(draw(st.integers(1, 14))):
        name, known = f"v{number}", sorted(channels)
        first = draw(st.sampled_from(known))
        alike = [other for other in known if channels[other] == channels[first]]
        kind = draw(st.sampled_from(["activate", "add", "concat", "conv", "residual", "view"]))
        channels[name] = channels[first]
        if kind == "activate":
            ops.append(Activate(inputs=(first,), output=name, activation=RELU))
        elif kind == "add":
            ops.append(Add(inputs=(first, draw(st.sampled_from(alike))), output=name))
        elif kind == "concat" and channels[first] <= 16:
            second = draw(st.sampled_from(known))
            channels[name] += channels[second]
            ops.append(Concat(inputs=(first, second), output=name))
        elif kind == "view":
            ops.append(Flatten(inputs=(first,), output=f"{name}_rows"))
            ops.append(Unflatten(inputs=(f"{name}_rows",), output=name, height=2, width=2))
        else:
            residual = (draw(st.sampled_from(alike)),) if kind == "residual" else ()
            ops.append(Conv(inputs=(first, *residual), output=name, weight=f"w{channels[first]}", activation=RELU))
    made = [op.output for op in ops]
    outputs = draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    return Program(input="x", ops=tuple(ops), outputs=tuple(outputs))


def make_weights(program: Program) -> dict[str, torch.Tensor]:
    weights = {}
    for name in program.weights():
        c = int(name[1:])
        weights[name] = torch.randn(c, 1, 1, c, generator=torch.Generator().manual_seed(c)) / c
    return weights


def sizes_of(executor: CpuExecutor) -> dict[str, int]:
    shapes = executor.shapes((1, 2, 2, CHANNELS))
    return {name: 4 * torch.Size(shape).numel() for name, shape in shapes.items()}


def lifetimes(program: Program, plan: MemoryPlan) -> dict[str, tuple[int, int]]:
    """First and last operation that touch each buffer of the arena, worked out by itself."""
    found: dict[str, tuple[int, int]] = {}
    for i, op in enumerate(program.ops):
        for name in (*op.inputs, op.output):
            buffer = plan.buffers[name]
            if buffer in plan.offsets:
                found[buffer] = (found.get(buffer, (i, i))[0], i)
    return found


@settings(max_examples=150, deadline=None)
@given(program=programs())
def test_live_buffers_never_overlap(program: Program) -> None:
    executor = CpuExecutor(program, make_weights(program))
    sizes = sizes_of(executor)
    plan = plan_memory(program, sizes)
    lives = lifetimes(program, plan)
    assert set(lives) == set(plan.offsets)
    for a, start in plan.offsets.items():
        assert start % ALIGNMENT == 0
        assert start + sizes[a] <= plan.arena_bytes
        for b, other in plan.offsets.items():
            if a < b and lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]:
                assert start + sizes[a] <= other or other + sizes[b] <= start, (a, b)
    aligned = sum(-(-sizes[name] // ALIGNMENT) * ALIGNMENT for name in plan.offsets)
    assert plan.live_bytes <= plan.arena_bytes <= aligned
    assert plan.live_bytes <= plan.total_bytes == sum(sizes[name] for name in plan.offsets)
    for name in (program.input, *program.outputs):
        assert plan.buffers[name] not in plan.offsets


@settings(max_examples=100, deadline=None)
@given(program=programs())
def test_values_are_what_they_are_without_a_plan(program: Program) -> None:
    """Everything in the arena, in place where it may be, against operations that each make a tensor of their own."""
    weights = make_weights(program)
    x = torch.randn(1, 2, 2, CHANNELS, generator=torch.Generator().manual_seed(0))
    given_x = x.clone()
    executor = CpuExecutor(program, weights, all_in_arena=True)
    outputs = executor(x)
    torch.testing.assert_close(x, given_x, rtol=0, atol=0)
    for output, expected in zip(outputs, evaluate(program, weights, x), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    kept = [output.clone() for output in outputs]
    executor(torch.randn(1, 2, 2, CHANNELS))
    assert all(torch.equal(a, b) for a, b in zip(outputs, kept, strict=True)), "outputs outlast the next run"


def evaluate(program: Program, weights: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    values = {"x": x}
    for op in program.ops:
        a = values[op.inputs[0]]
        match op:
            case Activate():
                result = a.relu()
            case Add():
                result = a + values[op.inputs[1]]
            case Concat():
                result = torch.cat([a, values[op.inputs[1]]], dim=-1)
            case Conv():
                result = a @ weights[op.weight][:, 0, 0].T
                result = (result + values[op.inputs[1]] if len(op.inputs) == 2 else result).relu()
            case Flatten():
                result = a.reshape(len(a), -1)
            case _:
                result = a.reshape(len(a), 2, 2, -1)
        values[op.output] = result
    return [values[name] for name in program.outputs]


def chain(length: int) -> Program:
    """Convolutions one after another."""
    ops = [Conv(inputs=(f"v{i - 1}" if i else "x",), output=f"v{i}", weight="w3") for i in range(length)]
    return Program(input="x", ops=tuple(ops), outputs=(f"v{length - 1}",))


def test_a_chain_takes_two_buffers() -> None:
    program = chain(20)
    plan = plan_memory(program, {f"v{i}": 1000 for i in range(20)} | {"x": 1000})
    assert plan.arena_bytes == ALIGNMENT * 4 + 1000
    assert (plan.live_bytes, plan.total_bytes) == (2000, 19_000)
    assert plan.in_place == {}


def test_a_residual_that_nobody_reads_later_is_overwritten() -> None:
    ops: list[Op] = [
        Conv(inputs=("x",), output="a", weight="w3"),
        Conv(inputs=("a",), output="b", weight="w3"),
        Conv(inputs=("b", "a"), output="c", weight="w3"),
        Conv(inputs=("c",), output="d", weight="w3"),
        Conv(inputs=("d", "c"), output="e", weight="w3"),
        Conv(inputs=("e", "c"), output="f", weight="w3"),
    ]
    program = Program(input="x", ops=tuple(ops), outputs=("f",))
    plan = plan_memory(program, dict.fromkeys("xabcdef", 1000))
    assert plan.in_place == {"c": 1, "f": 1}
    assert plan.buffers["c"] == "a", "e still needs c, so that e is not in its place"
    assert "a" not in plan.offsets, "the last result outlasts the run"


def test_what_lives_elsewhere_takes_no_room() -> None:
    program = chain(4)
    sizes = {f"v{i}": 1000 for i in range(4)} | {"x": 1000}
    plan = plan_memory(program, sizes, outside={"v0", "v2"})
    assert set(plan.offsets) == {"v1"}
    assert plan.arena_bytes == 1000
