"""Running a serialised engine: a context for each shape, all in one piece of device memory, no waiting for the host."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpn_engine.backends.tensorrt.bindings import Bindings
from fpn_engine.backends.tensorrt.device import CudaDevice
from fpn_engine.errors import BackendError, PlanError

LEAN = "FPN_ENGINE_TENSORRT_LEAN"
IDLE_CONTEXTS = 32  # shapes kept ready; those that are part of a CUDA graph are kept for good


class Scratch:
    """Device memory for what engines keep between their layers; they run one after another and share it."""

    def __init__(self, device: CudaDevice) -> None:
        self.lock = threading.Lock()
        self._device = device
        self.memory = device.empty((0,), torch.uint8)

    def reserve(self, size: int) -> None:
        """Make it at least ``size`` bytes. To be called for every engine before the first one runs."""
        if self.memory.numel() < size:
            self.memory = self._device.empty((size,), torch.uint8)

    def lend(self, context: Any) -> None:
        if self.memory.numel():
            context.set_device_memory(self.memory.data_ptr(), self.memory.numel())


@dataclass(slots=True)
class _Bound:
    """A context for one shape: its outputs' names, shapes and types, and whether a CUDA graph has it."""

    context: Any
    outputs: list[tuple[str, tuple[int, ...], torch.dtype]]
    captured: bool = False


class EngineRunner:
    """An engine of one input, whose first axis counts what is independent: images or RoIs.

    Runs on the current stream and never waits for it, so that it can be captured in a CUDA graph once the shape has
    run before. Calls from several threads take turns; they must be on one stream, or on the default one.

    Args: data: the serialised engine, checked before. lean: it is for another version of TensorRT, run it by that one.
    Raises: PlanError or BackendError if TensorRT refuses it.
    """

    def __init__(
        self, data: bytes, bindings: Bindings, device: CudaDevice, scratch: Scratch, *, lean: bool = False
    ) -> None:
        trt = bindings.trt
        self._bindings, self._device, self._scratch = bindings, device, scratch
        with device.guard():
            self._runtime = _open_runtime(bindings, lean)
            self._engine = self._runtime.deserialize_cuda_engine(data)
            if self._engine is None:
                raise PlanError(f"TensorRT {bindings.version} cannot read the engine: {bindings.take_errors()}")
        types = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
        }
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._types = {name: types[self._engine.get_tensor_dtype(name)] for name in names}
        self._input, self._outputs = inputs[0], [name for name in names if name not in inputs]
        self._profiles = [
            [tuple(shape) for shape in self._engine.get_tensor_profile_shape(self._input, index)]
            for index in range(self._engine.num_optimization_profiles)
        ]
        self._bound: dict[tuple[int, ...], _Bound] = {}
        scratch.reserve(self._engine.device_memory_size_v2)

    @property
    def buffers(self) -> list[Tensor]:
        """What every run writes; the weights are the engine's own."""
        return [self._scratch.memory]

    def __call__(self, value: Tensor) -> dict[str, Tensor]:
        """The outputs by name, in tensors of their own.

        Args: value: the input; more along the first axis than the engine was built for is run in pieces.
        Raises: BackendError for a shape outside all profiles, or if TensorRT fails.
        """
        value = value.to(self._types[self._input]).contiguous()
        if not len(value):
            return {name: output[:0] for name, output in self._run(value.new_zeros(1, *value.shape[1:])).items()}
        pieces = [self._run(piece) for piece in value.split(self._most(tuple(value.shape)))]
        if len(pieces) == 1:
            return pieces[0]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in self._outputs}

    def _run(self, value: Tensor) -> dict[str, Tensor]:
        with self._scratch.lock, self._device.guard(), self._device.stream() as stream:
            bound = self._bind(tuple(value.shape), stream)
            outputs = {name: self._device.empty(shape, dtype) for name, shape, dtype in bound.outputs}
            for name, tensor in {self._input: value, **outputs}.items():
                bound.context.set_tensor_address(name, tensor.data_ptr())
            if not bound.context.execute_async_v3(stream):
                raise BackendError(f"TensorRT failed while running the model: {self._bindings.take_errors()}")
        return outputs

    def _bind(self, shape: tuple[int, ...], stream: int) -> _Bound:
        """The context for a shape; a graph that captured one keeps it, whatever shapes come later."""
        bound = self._bound.pop(shape, None)
        if bound is None:
            if self._device.is_capturing:
                raise BackendError(f"the shape {_text(shape)} must run once before it is captured in a CUDA graph")
            bound = self._make(shape, stream)
        bound.captured |= self._device.is_capturing
        self._bound[shape] = bound  # the latest last
        idle = [each for each, of in self._bound.items() if not of.captured]
        for each in idle[:-IDLE_CONTEXTS]:
            del self._bound[each]
        return bound

    def _make(self, shape: tuple[int, ...], stream: int) -> _Bound:
        trt = self._bindings.trt
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise BackendError(f"TensorRT makes no execution context: {self._bindings.take_errors()}")
        profile = next(index for index in range(len(self._profiles)) if self._holds(index, shape))
        done = context.set_optimization_profile_async(profile, stream) and context.set_input_shape(self._input, shape)
        if not done:
            raise BackendError(f"TensorRT does not take the shape {_text(shape)}: {self._bindings.take_errors()}")
        self._scratch.lend(context)
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        return _Bound(context, [(name, shapes[name], self._types[name]) for name in self._outputs])

    def _holds(self, profile: int, shape: tuple[int, ...]) -> bool:
        low, _, high = self._profiles[profile]
        return all(least <= side <= most for least, side, most in zip(low, shape, high, strict=True))

    def _most(self, shape: tuple[int, ...]) -> int:
        """How many along the first axis an engine takes at once of this shape."""
        one = (1, *shape[1:])
        counts = [self._profiles[index][2][0] for index in range(len(self._profiles)) if self._holds(index, one)]
        if not counts:
            ranges = " or ".join(f"{_text(low)} to {_text(high)}" for low, _, high in self._profiles)
            raise BackendError(
                f"the plan takes {self._input} of {ranges}, not {_text(shape)}; build it again with other sizes"
            )
        return max(counts)


def _open_runtime(bindings: Bindings, lean: bool) -> Any:
    runtime = bindings.trt.Runtime(bindings.logger)
    runtime.engine_host_code_allowed = False  # an engine may come from anywhere and is data, not a program
    if not lean:
        return runtime
    path = os.environ.get(LEAN)
    if not path:
        raise PlanError(
            f"the plan is for another version of TensorRT than {bindings.version} and needs the lean runtime of its "
            f"own; set {LEAN} to its libnvinfer_lean.so, or build the plan again"
        )
    loaded = runtime.load_runtime(path)
    if loaded is None:
        raise PlanError(f"cannot load the lean runtime {path}: {bindings.take_errors()}")
    loaded.engine_host_code_allowed = False
    return loaded


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
