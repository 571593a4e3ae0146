"""Memory: where every value of a program lives, so that values that are not alive together share one arena."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fpn_engine.backends.native.ops import Op
from fpn_engine.backends.native.program import Program

ALIGNMENT = 256  # bytes: a multiple of every vector and cache line, and what CUDA allocates by


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Places of a program's values for one shape of its input.

    Attributes:
        buffers: the buffer of each value, which is named after the first value in it. Views and results that overwrite
            their input are in their input's buffer.
        offsets: bytes from the arena's start, of each buffer that is in the arena.
        in_place: of each value that overwrites an input, which input of its operation that is.
        arena_bytes: the arena's size. live_bytes: the most bytes of the arena that are alive at once, below which no
            arrangement can go. total_bytes: what the arena's buffers would take side by side.
    """

    buffers: dict[str, str]
    offsets: dict[str, int]
    in_place: dict[str, int]
    arena_bytes: int
    live_bytes: int
    total_bytes: int


@dataclass(slots=True)
class _Buffer:
    size: int
    start: int  # index of the operation that makes its first value
    end: int  # index of the last operation that reads one of its values
    inside: bool


def plan_memory(
    program: Program, sizes: Mapping[str, int], outside: Collection[str] = (), fork: int | None = None
) -> MemoryPlan:
    """Place the values of a program in one arena.

    The largest buffer is placed first, each at the lowest offset where it meets no buffer that is alive with it
    (Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference", greedy by size).

    Args:
        sizes: bytes of every value.
        outside: values that live elsewhere, in tensors that their operations make, and so overwrite nothing. The
            program's input and outputs always live elsewhere, which is why they outlast a run.
        fork: the operation from which on they are in no order: what one of them needs is alive during all of them, and
            nothing is overwritten.
    """
    last_read = {name: i for i, op in enumerate(program.ops) for name in op.inputs}
    kept = {program.input, *program.outputs}
    names = {program.input: program.input}
    buffers = {program.input: _Buffer(sizes[program.input], -1, last_read.get(program.input, -1), False)}
    in_place: dict[str, int] = {}
    for i, op in enumerate(program.ops):
        shared = 0 if op.VIEW else None
        if not op.VIEW and op.output not in outside and (fork is None or i < fork):
            shared = _overwritten(op, i, names, buffers, sizes, _kept(names, kept))
        end = last_read.get(op.output, i)
        inside = op.output not in kept and op.output not in outside
        if shared is None:
            names[op.output] = op.output
            buffers[op.output] = _Buffer(sizes[op.output], i, end, inside)
            continue
        names[op.output] = names[op.inputs[shared]]
        buffer = buffers[names[op.output]]
        buffer.end = max(buffer.end, end)
        buffer.inside &= inside
        if not op.VIEW:
            in_place[op.output] = shared
    arena = {name: buffer for name, buffer in buffers.items() if buffer.inside}
    if fork is not None:
        for buffer in arena.values():
            if buffer.end >= fork:
                buffer.start, buffer.end = min(buffer.start, fork), len(program.ops) - 1
    offsets = _place(arena)
    return MemoryPlan(
        buffers=names,
        offsets=offsets,
        in_place=in_place,
        arena_bytes=max((offsets[name] + buffer.size for name, buffer in arena.items()), default=0),
        live_bytes=_most_alive(arena, len(program.ops)),
        total_bytes=sum(buffer.size for buffer in arena.values()),
    )


def _kept(names: Mapping[str, str], kept: Collection[str]) -> set[str]:
    """Buffers that hold a value which outlasts the run."""
    return {names[name] for name in kept if name in names}


def _overwritten(
    op: Op,
    index: int,
    names: Mapping[str, str],
    buffers: Mapping[str, _Buffer],
    sizes: Mapping[str, int],
    kept: Collection[str],
) -> int | None:
    """The input that the output may overwrite: as large, read by nobody later, and read once here."""
    for i in op.in_place:
        name = names[op.inputs[i]]
        others = [names[other] for j, other in enumerate(op.inputs) if j != i]
        fits = sizes[op.inputs[i]] == sizes[op.output] == buffers[name].size
        if fits and name not in kept and name not in others and buffers[name].end <= index:
            return i
    return None


def _place(buffers: Mapping[str, _Buffer]) -> dict[str, int]:
    offsets: dict[str, int] = {}
    for name, buffer in sorted(buffers.items(), key=lambda item: (-item[1].size, item[1].start)):
        taken = sorted(
            (offsets[other], offsets[other] + buffers[other].size)
            for other in offsets
            if buffers[other].start <= buffer.end and buffer.start <= buffers[other].end
        )
        offset = 0
        for start, end in taken:
            if offset + buffer.size <= start:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[name] = offset
    return offsets


def _most_alive(buffers: Mapping[str, _Buffer], steps: int) -> int:
    return max((sum(b.size for b in buffers.values() if b.start <= i <= b.end) for i in range(steps)), default=0)
