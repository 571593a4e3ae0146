"""The executor: runs a program's operations in order, their values where the memory plan has them."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fpn_engine.backends.native.cpu import DTYPES, make_runs, makes_its_output
from fpn_engine.backends.native.memory import MemoryPlan, plan_memory
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.shapes import Shape, infer_shapes

MAX_PREPARED = 64  # shapes whose memory plans are kept: batches of one image come in at most 83 sizes under 800/1333


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A program for one shape of its input.

    ``places`` are the tensors in the arena that operations write into. ``read_last`` are the values that nobody reads
    after each operation.
    """

    memory: MemoryPlan
    places: dict[str, Tensor]
    read_last: list[list[str]]


class CpuExecutor:
    """Runs a program on the CPU; several threads may call it, one at a time goes through.

    Args:
        weights: the stored tensors by name.
        threads: CPU threads, None leaves torch's setting.
        all_in_arena: put every inner value into the arena, also where that takes a copy that nothing else needs; a
            proof of the memory plan, as devices rely on it whose kernels all write where they are told.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        *,
        threads: int | None = None,
        all_in_arena: bool = False,
    ) -> None:
        self.program = program
        self._shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        self._dtypes = program.dtypes()
        self._threads = threads
        self._outside = frozenset(op.output for op in program.ops if not all_in_arena and makes_its_output(op))
        with torch.inference_mode():
            self._runs = make_runs(program, weights)
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._prepared: OrderedDict[Shape, _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs for ``x``, (N, H, W, C) or (R, F) of any number type; they are the caller's to keep.

        Raises: ValueError for a shape that the program does not fit.
        """
        with self._lock, torch.inference_mode(), cpu_threads(self._threads):
            prepared = self._prepare(tuple(x.shape))
            values = {self.program.input: _dense(x, DTYPES[self.program.input_dtype])}
            for op, run, read_last in zip(self.program.ops, self._runs, prepared.read_last, strict=True):
                inputs = [values[name] for name in op.inputs]
                index = prepared.memory.in_place.get(op.output)
                place = prepared.places.get(op.output) if index is None else inputs[index]
                result = run(inputs, place)
                if place is not None and result.data_ptr() != place.data_ptr():
                    result = place.copy_(result)
                values[op.output] = result
                for name in read_last:
                    del values[name]
            return [values[name] for name in self.program.outputs]

    def plan(self, shape: Shape) -> MemoryPlan:
        """Where the values live for an input of ``shape``. Raises ValueError as a call does."""
        return plan_memory(self.program, count_bytes(self.program, self.shapes(shape)), self._outside)

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """The shape of every value for an input of ``shape``. Raises ValueError as a call does."""
        return infer_shapes(self.program.ops, {self.program.input: shape}, self._shapes)

    def _prepare(self, shape: Shape) -> _Prepared:
        if shape in self._prepared:
            self._prepared.move_to_end(shape)
            return self._prepared[shape]
        memory = self.plan(shape)
        if memory.arena_bytes > len(self._arena):
            self._prepared.clear()  # their tensors keep the old arena
            self._arena = torch.empty(memory.arena_bytes, dtype=torch.uint8)
        shapes = self.shapes(shape)
        places = {}
        for op in self.program.ops:
            name = op.output
            if not op.VIEW and name not in memory.in_place and memory.buffers[name] in memory.offsets:
                places[name] = self._view(memory.offsets[memory.buffers[name]], shapes[name], self._dtypes[name])
        self._prepared[shape] = prepared = _Prepared(memory, places, find_last_reads(self.program))
        if len(self._prepared) > MAX_PREPARED:
            self._prepared.popitem(last=False)
        return prepared

    def _view(self, offset: int, shape: Shape, dtype: str) -> Tensor:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        return self._arena[offset : offset + size].view(DTYPES[dtype]).view(shape)


def find_last_reads(program: Program) -> list[list[str]]:
    """The values that are not needed after each operation, so that torch may reuse their memory."""
    last = {name: i for i, op in enumerate(program.ops) for name in (*op.inputs, op.output)}
    found: list[list[str]] = [[] for _ in program.ops]
    for name, index in last.items():
        if name not in program.outputs:
            found[index].append(name)
    return found


def count_bytes(program: Program, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Bytes of every value."""
    dtypes = program.dtypes()
    return {name: math.prod(shape) * DTYPES[dtypes[name]].itemsize for name, shape in shapes.items()}


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself, or a copy in order and of that type."""
    if x.dtype == dtype and x.is_contiguous():
        return x
    return torch.empty(x.shape, dtype=dtype).copy_(x)


@contextlib.contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """torch's threads set to ``number`` for a while."""
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
