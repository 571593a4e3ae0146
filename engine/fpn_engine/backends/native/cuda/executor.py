"""The executor on CUDA: launches a program's operations on the current stream, every value at a planned place.

One call takes one arena from torch's allocator, and its outputs beside it. In a captured graph these come from the
graph's pool, so that all addresses are fixed there and live as long as the graph; outside they go back to the stream
that used them. So several threads and streams may call at once, and a larger shape moves nothing under a graph's feet.

Where the program falls apart into branches, as into the levels of a pyramid, the small ones run on a stream beside the
large one: alone they would leave most of the GPU idle.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fpn_engine import beside
from fpn_engine.backends.native.branches import Branches, find_branches
from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.cpu_convolution import Run
from fpn_engine.backends.native.cuda.choices import Choices
from fpn_engine.backends.native.cuda.runs import Weights, make_only_run, make_tactic_run
from fpn_engine.backends.native.cuda.work import Work
from fpn_engine.backends.native.executor import MAX_PREPARED, count_bytes, find_last_reads
from fpn_engine.backends.native.memory import MemoryPlan, plan_memory
from fpn_engine.backends.native.ops import Conv, Linear, Op
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.shapes import Shape, infer_shapes


@dataclass(frozen=True, slots=True)
class _Step:
    """An operation on one shape.

    ``in_place`` is the input that it overwrites; else ``offset`` is its place in the arena, None for a tensor of its
    own, which it makes itself if ``makes_its_output``. ``read_last`` are the values that nobody reads after it.
    """

    op: Op
    run: Run
    shape: Shape
    dtype: torch.dtype
    in_place: int | None
    offset: int | None
    makes_its_output: bool
    read_last: list[str]


@dataclass(frozen=True, slots=True)
class _Prepared:
    memory: MemoryPlan
    steps: list[_Step]
    branches: Branches | None


class CudaExecutor:
    """Runs a program on a device; several threads may call it.

    Args:
        weights: the stored tensors by name, which are moved to ``device``.
        choices: the tactic for each piece of work.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor], choices: Choices, device: torch.device) -> None:
        self.program = program
        self.choices = choices
        self._device = device
        with torch.inference_mode():
            self._weights = Weights({name: tensor.to(device) for name, tensor in weights.items()})
        self._shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        self._dtypes = program.dtypes()
        self._prepared: OrderedDict[Shape, _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs for ``x``, (N, H, W, C) or (R, F) of any number type; they are the caller's to keep.

        Raises: ValueError for a shape that the program does not fit.
        """
        with torch.inference_mode(), self._on_device():
            prepared = self._prepare(tuple(x.shape))
            arena = torch.empty(prepared.memory.arena_bytes, dtype=torch.uint8, device=self._device)
            values = {self.program.input: self._take(x)}
            fork = prepared.branches.fork if prepared.branches else len(prepared.steps)
            for step in prepared.steps[:fork]:
                self._run(step, values, self._place(step, values, arena))
                for name in step.read_last:
                    del values[name]
            if prepared.branches:
                self._run_branches(prepared.steps, prepared.branches, values, arena)
            return [values[name] for name in self.program.outputs]

    def _run(self, step: _Step, values: dict[str, Tensor], place: Tensor | None) -> None:
        values[step.op.output] = step.run([values[name] for name in step.op.inputs], place)

    def _run_branches(self, steps: list[_Step], branches: Branches, values: dict[str, Tensor], arena: Tensor) -> None:
        """Memory belongs to the current stream, and is all kept until the branches have met again."""
        places = {step.op.output: self._place(step, values, arena) for step in steps[branches.fork :]}
        aside: list[_Step] = []
        along: list[_Step] = []
        for number, step in enumerate(steps[branches.fork :], branches.fork):
            (aside if number in branches.aside else along).append(step)

        def run(chosen: list[_Step]) -> dict[str, Tensor]:
            made = dict(values)
            for step in chosen:
                self._run(step, made, places[step.op.output])
            return made

        meet = beside.begin(lambda: run(aside))
        try:
            ours = run(along)
        finally:
            theirs = meet()
        values |= theirs | ours

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Triton launches on the current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def plan(self, shape: Shape) -> MemoryPlan:
        """Where the values live for an input of ``shape``. Raises ValueError as a call does."""
        return self._prepare(shape).memory

    def _place(self, step: _Step, values: Mapping[str, Tensor], arena: Tensor) -> Tensor | None:
        if step.op.VIEW or step.makes_its_output:
            return None
        if step.in_place is not None:
            return values[step.op.inputs[step.in_place]]
        if step.offset is None:
            return torch.empty(step.shape, dtype=step.dtype, device=self._device)
        size = torch.Size(step.shape).numel() * step.dtype.itemsize
        return arena[step.offset : step.offset + size].view(step.dtype).view(step.shape)

    def _take(self, x: Tensor) -> Tensor:
        """``x`` itself, or a copy in order, on the device and of the program's number type."""
        dtype = DTYPES[self.program.input_dtype]
        if x.dtype == dtype and x.is_contiguous() and x.device == self._device:
            return x
        return torch.empty(x.shape, dtype=dtype, device=self._device).copy_(x)

    def _prepare(self, shape: Shape) -> _Prepared:
        with self._lock:
            if shape in self._prepared:
                self._prepared.move_to_end(shape)
                return self._prepared[shape]
            self._prepared[shape] = prepared = self._make(shape)
            if len(self._prepared) > MAX_PREPARED:
                self._prepared.popitem(last=False)
            return prepared

    def _make(self, shape: Shape) -> _Prepared:
        ops, program = self.program.ops, self.program
        shapes = infer_shapes(ops, {program.input: shape}, self._shapes)
        runs: list[Run] = []
        costs: list[float] = []
        outside = set()
        for op in ops:
            costs.append(0.0)
            if isinstance(op, (Conv, Linear)):
                work = Work.of(op, shapes, self._dtypes, self._shapes[op.weight])
                tactic = self.choices.pick(work)
                if tactic.makes_its_output:
                    outside.add(op.output)
                costs[-1] = float(work.rows) * work.columns * work.depth
                runs.append(make_tactic_run(tactic, op, work, self._weights, self.choices.gpu.processors))
            else:
                runs.append(make_only_run(op, self._weights))
        branches = find_branches(ops, costs)
        memory = plan_memory(program, count_bytes(program, shapes), outside, branches.fork if branches else None)
        steps = [
            _Step(
                op=op,
                run=run,
                shape=shapes[op.output],
                dtype=DTYPES[self._dtypes[op.output]],
                in_place=memory.in_place.get(op.output),
                offset=memory.offsets.get(memory.buffers[op.output]),
                makes_its_output=op.output in outside,
                read_last=read_last,
            )
            for op, run, read_last in zip(ops, runs, find_last_reads(program), strict=True)
        ]
        return _Prepared(memory, steps, branches)
