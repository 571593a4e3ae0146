"""Trunk and box head on the native backend: reading their parts of a plan, checking them, running them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fpn_engine.backends import TrunkOutput
from fpn_engine.backends.loading import PRECISIONS
from fpn_engine.backends.native.cpu import DTYPES
from fpn_engine.backends.native.cpu_convolution import has_bfloat16
from fpn_engine.backends.native.executor import CpuExecutor, count_bytes
from fpn_engine.backends.native.memory import MemoryPlan, plan_memory
from fpn_engine.backends.native.ops import FLOAT32
from fpn_engine.backends.native.program import Program, read_program
from fpn_engine.backends.native.shapes import Shape, infer_shapes
from fpn_engine.errors import BackendError, PlanError
from fpn_engine.plan import MAX_REASON, Manifest, Plan, rebuild_hint
from fpn_engine.spec import ModelSpec

TACTICS = "tactics.json"  # the part of a CUDA plan beside trunk and head
OLDEST_GPU = 80  # compute capability times ten: bfloat16 on tensor cores, and what the kernels are compiled for
PROBE_SIDE = 128  # pixels: the smallest image on which every level up to p7 has a cell


class Executor(Protocol):
    """Runs a program on a device; see :class:`fpn_engine.backends.native.executor.CpuExecutor`."""

    program: Program

    def __call__(self, x: Tensor) -> list[Tensor]: ...

    def plan(self, shape: Shape) -> MemoryPlan: ...


MakeExecutor = Callable[[Program, Mapping[str, Tensor]], Executor]


def part_names(spec: ModelSpec, device: str = "cpu") -> list[str]:
    """The files of a native plan."""
    parts = ("trunk", "head") if spec.has_box_head else ("trunk",)
    names = [f"{part}.{kind}" for part in parts for kind in ("json", "safetensors")]
    return [*names, TACTICS] if device == "cuda" else names


def pack_part(name: str, program: Program, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The two files of a part: the program and its tensors."""
    tensors = {key: weights[key].contiguous() for key in program.weights()}
    return {f"{name}.json": program.to_json().encode(), f"{name}.safetensors": safetensors.torch.save(tensors)}


def unpack_part(name: str, parts: Mapping[str, bytes]) -> tuple[Program, dict[str, Tensor]]:
    """What :func:`pack_part` packed. Raises ValueError that says what is wrong."""
    try:
        weights = safetensors.torch.load(parts[f"{name}.safetensors"])
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError):
        raise ValueError(f"{name}.safetensors is no safetensors file") from None
    try:
        program = read_program(parts[f"{name}.json"], {key: tuple(tensor.shape) for key, tensor in weights.items()})
        _check_dtypes(program, weights)
    except ValueError as error:
        raise ValueError(f"{name}.json: {error}") from None
    return program, weights


def _check_dtypes(program: Program, weights: Mapping[str, Tensor]) -> None:
    """A tensor has the number type of the operations that read it."""
    dtypes = program.dtypes()
    for op in program.ops:
        for key in op.weights:
            if weights[key].dtype != DTYPES[dtypes[op.inputs[0]]]:
                raise ValueError(f"{op.KIND} {op.output} has a tensor {key} of another number type")


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
        _check_outputs(program, weights, (1, PROBE_SIDE, PROBE_SIDE, 3), expected)
        _check_float32(program, features)
        self.input_dtype = torch.float32
        if make_executor is None:
            self.executor = CpuExecutor(program, weights, threads=threads)
        else:
            self.executor = make_executor(program, weights)
            self.input_dtype = DTYPES[program.input_dtype]

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
        _check_outputs(program, weights, (1, width), [spec.num_classes, 4 * spec.num_classes])
        _check_float32(program, 0)
        make = make_executor or (lambda program, weights: CpuExecutor(program, weights, threads=threads))
        self.executor = make(program, weights)

    def __call__(self, roi_features: Tensor, /) -> tuple[Tensor, Tensor]:
        rows = roi_features.permute(0, 2, 3, 1).flatten(1)
        class_logits, box_deltas = self.executor(rows)
        return class_logits, box_deltas


def _check_outputs(program: Program, weights: Mapping[str, Tensor], shape: Shape, channels: list[int]) -> None:
    """The program makes outputs of the model's number, channels and form from an input of ``shape``."""
    tensors = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    shapes = infer_shapes(program.ops, {program.input: shape}, tensors)
    found = [shapes[name] for name in program.outputs]
    if [sides[-1] for sides in found] != channels or {len(sides) for sides in found} != {len(shape)}:
        raise ValueError(f"its outputs have {[sides[-1] for sides in found]} channels, not {channels}")


def _check_float32(program: Program, first: int) -> None:
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


def check_native(manifest: Manifest) -> None:
    """Raise PlanError if a native plan does not fit what is here.

    Of torch no version is asked for: a plan holds operations and tensors, nothing that torch compiled. What is checked
    is that the processor convolves in the plan's precision.
    """
    if manifest.precision not in PRECISIONS or manifest.device not in ("cpu", "cuda"):
        kind = f"native {manifest.precision} on {manifest.device}"
        raise PlanError(f"the plan is for {kind}, which this version does not run; {rebuild_hint(manifest)}")
    if manifest.device == "cuda":
        _check_cuda(manifest)
    elif manifest.precision == "bf16" and not has_bfloat16():
        raise PlanError(
            "the plan is for bf16, which this processor or this torch cannot convolve in; "
            f"{rebuild_hint(manifest, precision='fp32')}"
        )
    names = part_names(manifest.spec, manifest.device)
    if sorted(manifest.parts) != sorted(names):
        raise PlanError(f"the plan holds {sorted(manifest.parts)}, not {', '.join(names)}; {rebuild_hint(manifest)}")


def _check_cuda(manifest: Manifest) -> None:
    try:
        check_native_device()
    except BackendError as error:
        plan = f"the plan is for native {manifest.precision} on cuda"
        raise PlanError(f"{plan}, and {error}; {rebuild_hint(manifest, precision='fp32')}") from None


def check_native_device() -> None:
    """Raise BackendError if there is no CUDA device that the kernels run on."""
    if not torch.cuda.is_available():
        raise BackendError("PyTorch finds no CUDA device here, as fpn-engine doctor explains")
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < OLDEST_GPU:
        oldest = f"{OLDEST_GPU // 10}.{OLDEST_GPU % 10}"
        raise BackendError(f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, below {oldest}")
    if importlib.util.find_spec("triton") is None:
        raise BackendError("Triton is not installed, which the native backend needs on CUDA; pip install triton")


def load_native(plan: Plan, threads: int | None = None) -> tuple[NativeTrunk, NativeHead | None]:
    """Make the parts of a native plan ready.

    Raises: PlanError if the plan does not fit what is here or its parts are not what a build writes, BackendError if
        the device fails meanwhile.
    """
    check_native(plan.manifest)
    spec = plan.manifest.spec
    try:
        make = None
        if plan.manifest.device == "cuda":
            from fpn_engine.backends.native.cuda.loading import prepare

            make = prepare(plan)
        trunk = NativeTrunk(*unpack_part("trunk", plan.parts), spec, threads, make)
        head = NativeHead(*unpack_part("head", plan.parts), spec, threads, make) if spec.has_box_head else None
    except (ValueError, RuntimeError) as error:
        if plan.manifest.device == "cuda" and isinstance(error, RuntimeError):
            raise BackendError(
                f"the CUDA device failed while the plan was loaded: {str(error)[:MAX_REASON]}"
            ) from error
        raise PlanError(f"the plan is damaged: {str(error)[:MAX_REASON]}; {rebuild_hint(plan.manifest)}") from None
    return trunk, head
