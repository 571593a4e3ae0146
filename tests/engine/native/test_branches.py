"""Branches: which operations may run beside others, and that their values have places that nobody else needs."""

from __future__ import annotations

import itertools

import pytest

from fpn_engine.backends.native.branches import Branches, find_branches
from fpn_engine.backends.native.executor import CpuExecutor, count_bytes
from fpn_engine.backends.native.memory import MemoryPlan, plan_memory
from fpn_engine.backends.native.ops import Conv, Op
from fpn_engine.backends.native.packing import unpack_part
from fpn_engine.backends.native.program import Program
from tests.parity.subject import random_subject


def conv(*inputs: str, to: str) -> Conv:
    return Conv(inputs=inputs, output=to, weight="w")


PYRAMID: list[Op] = [
    conv("x", to="c2"),
    conv("c2", to="c3"),
    conv("c3", to="m3"),
    conv("c2", "m3", to="m2"),
    conv("m2", to="p2"),
    conv("m3", to="p3"),
    conv("p2", to="r2"),
    conv("p3", to="r3"),
]


def test_the_small_levels_of_a_pyramid_run_beside_the_large_one() -> None:
    costs = [4.0, 1, 1, 4, 8, 2, 8, 2]
    assert find_branches(PYRAMID, costs) == Branches(3, frozenset({5, 7}))
    assert find_branches(PYRAMID, [*costs[:4], 2.0, 8, 2, 8]) == Branches(3, frozenset({3, 4, 6})), "or the other way"


@pytest.mark.parametrize("costs", [[1.0, 1, 1, 1, 1, 1, 1, 0], [0.0] * 8])
def test_what_hangs_together_has_no_branches(costs: list[float]) -> None:
    assert find_branches(PYRAMID[:4], costs[:4]) is None
    assert find_branches([], []) is None


def test_what_costs_nothing_is_no_reason() -> None:
    assert find_branches(PYRAMID, [1.0] * 5 + [0, 1, 0]) is None
    assert find_branches(PYRAMID, [100.0] * 5 + [1, 1, 1]) is None


def test_branches_keep_all_they_need_until_they_meet() -> None:
    program = Program(input="x", ops=tuple(PYRAMID), outputs=("r2", "r3"))
    sizes = {name: 1000 for op in PYRAMID for name in (*op.inputs, op.output)}
    plain, forked = plan_memory(program, sizes), plan_memory(program, sizes, fork=3)
    used = [forked.offsets[name] for name in ("c2", "m3", "m2", "p2", "p3")]
    assert len(set(used)) == 5
    assert len({plain.offsets[name] for name in ("c2", "m3", "m2", "p2", "p3")}) < 5
    assert plain.in_place == {"m2": 1} or forked.in_place == {}
    assert forked.live_bytes == 5000


def test_a_real_detector() -> None:
    """All levels but the finest are aside, and no two places of theirs meet."""
    subject = random_subject("resnet50")
    program, weights = unpack_part("trunk", subject.native_plan.parts)
    executor = CpuExecutor(program, weights)
    shapes = executor.shapes((1, 256, 256, 3))
    costs = [float(isinstance(op, Conv)) * shapes[op.output][1] ** 2 for op in program.ops]
    branches = find_branches(program.ops, costs)
    assert branches is not None
    heights = {shapes[program.ops[i].output][1] for i in branches.aside}
    stay = {shapes[op.output][1] for i, op in enumerate(program.ops) if i >= branches.fork and i not in branches.aside}
    assert max(heights) < min(stay) == 64
    plan = plan_memory(program, count_bytes(program, shapes), fork=branches.fork)
    assert_apart(program, plan, branches.fork, count_bytes(program, shapes))


def assert_apart(program: Program, plan: MemoryPlan, fork: int, sizes: dict[str, int]) -> None:
    names = {plan.buffers[name] for op in program.ops[fork:] for name in (*op.inputs, op.output)}
    places = sorted((plan.offsets[name], sizes[name]) for name in names & plan.offsets.keys())
    assert len(places) >= 4
    for (start, size), (after, _) in itertools.pairwise(places):
        assert start + size <= after
