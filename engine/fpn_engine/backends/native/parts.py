"""Trunk and box head on the native backend: programs that fit the model, on an executor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fpn_engine.backends import TrunkOutput
from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.executor import CpuExecutor, count_bytes
from fpn_engine.backends.native.memory import MemoryPlan, plan_memory
from fpn_engine.backends.native.ops import FLOAT32
from fpn_engine.backends.native.packing import unpack_part
from fpn_engine.backends.native.program import Program
from fpn_engine.backends.native.shapes import Shape, infer_shapes
from fpn_engine.plan import Plan
from fpn_engine.spec import ModelSpec

PROBE_SIDE = 128  # pixels: the smallest image on which every level up to p7 has a cell


class Executor(Protocol):
    """Runs a program on a device; see :class:`fpn_engine.backends.native.executor.CpuExecutor`."""

    program: Program

    def __call__(self, x: Tensor) -> list[Tensor]: ...

    def plan(self, shape: Shape) -> MemoryPlan: ...


MakeExecutor = Callable[[Program, Mapping[str, Tensor]], Executor]


def make_trunk_executor(
    program: Program, weights: Mapping[str, Tensor], threads: int | None, make_executor: MakeExecutor | None
) -> tuple[Executor, torch.dtype]:
    """A trunk's executor and the number type of its images: float32 on the CPU, elsewhere the program's."""
    if make_executor is None:
        return CpuExecutor(program, weights, threads=threads), torch.float32
    return make_executor(program, weights), DTYPES[program.input_dtype]


class NativeTrunk:
    """The trunk: (N, 3, H, W) images to maps in the order features, objectness, deltas, all channels_last.

    Objectness and deltas are float32; features have the plan's precision. ``input_dtype``: see Trunk.
    Args: threads: of the CPU. make_executor: for another device.
    Raises: ValueError if the program does not make such maps.
    """

    executor: Executor

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        spec: ModelSpec,
        threads: int | None = None,
        make_executor: MakeExecutor | None = None,
    ) -> None:
        self._levels = len(spec.levels) if spec.has_rpn else 0
        features = spec.levels.index(spec.roi_levels[-1]) + 1 if spec.has_box_head else 0
        expected = [spec.feature_channels] * features
        expected += [spec.num_anchors] * self._levels + [4 * spec.num_anchors] * self._levels
        check_outputs(program, weights, (1, PROBE_SIDE, PROBE_SIDE, 3), expected)
        check_float32(program, features)
        self.executor, self.input_dtype = make_trunk_executor(program, weights, threads, make_executor)

    def __call__(self, images: Tensor, /) -> TrunkOutput:
        maps = tuple(level.permute(0, 3, 1, 2) for level in self.executor(images.permute(0, 2, 3, 1)))
        split = len(maps) - 2 * self._levels
        return TrunkOutput(maps[:split], maps[split : split + self._levels], maps[split + self._levels :])


class NativeHead:
    """The box head on RoI features (R, C, S, S), whose answers are float32.

    Raises: ValueError if the program does not fit the spec.
    """

    executor: Executor

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        spec: ModelSpec,
        threads: int | None = None,
        make_executor: MakeExecutor | None = None,
    ) -> None:
        width = spec.feature_channels * spec.box_roi_pool.output_size**2
        check_outputs(program, weights, (1, width), [spec.num_classes, 4 * spec.num_classes])
        check_float32(program, 0)
        make = make_executor or (lambda program, weights: CpuExecutor(program, weights, threads=threads))
        self.executor = make(program, weights)

    def __call__(self, roi_features: Tensor, /) -> tuple[Tensor, Tensor]:
        rows = roi_features.permute(0, 2, 3, 1).flatten(1)
        class_logits, box_deltas = self.executor(rows)
        return class_logits, box_deltas


def check_outputs(program: Program, weights: Mapping[str, Tensor], shape: Shape, channels: list[int]) -> None:
    """The program makes outputs of the model's number, channels and form from an input of ``shape``."""
    tensors = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    shapes = infer_shapes(program.ops, {program.input: shape}, tensors)
    found = [shapes[name] for name in program.outputs]
    if [sides[-1] for sides in found] != channels or {len(sides) for sides in found} != {len(shape)}:
        raise ValueError(f"its outputs have {[sides[-1] for sides in found]} channels, not {channels}")


def check_float32(program: Program, first: int) -> None:
    """Outputs from ``first`` on are float32: the pipeline decodes and ranks them."""
    dtypes = program.dtypes()
    if odd := [name for name in program.outputs[first:] if dtypes[name] != FLOAT32]:
        raise ValueError(f"the output {odd[0]} is not float32")


def plan_trunk_memory(plan: Plan, batch: int, size: tuple[int, int]) -> MemoryPlan:
    """Where the trunk's inner values live for ``batch`` images of a padded size, all of them in the arena.

    Raises: ValueError if the parts are not what a build writes.
    """
    program, weights = unpack_part("trunk", plan.parts)
    shapes = infer_shapes(
        program.ops, {program.input: (batch, *size, 3)}, {name: tuple(tensor.shape) for name, tensor in weights.items()}
    )
    return plan_memory(program, count_bytes(program, shapes))
