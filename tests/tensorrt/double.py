"""A double of TensorRT over its real surface: ONNX Runtime runs what the parser was given, in the same memory.

It keeps TensorRT's rules as far as they are known: profiles bound shapes, an engine is only what its builder wrote, a
context needs its memory, its shape and every address before it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto

from fpn_engine.backends.tensorrt.device import CudaDevice
from fpn_engine.backends.tensorrt.target import Gpu
from tests.tensorrt.emulation import emulate_bf16
from tests.tensorrt.ort_run import open_session, run
from tests.tensorrt.parser_operators import DOCUMENTED
from tests.tensorrt.strict import Behaviours, StrictModule

MAGIC = b"engine of the double\n"
SCRATCH_BYTES = 4096
STREAM = 4711
H200 = Gpu(name="NVIDIA H200", capability=(9, 0))
TYPES = {
    TensorProto.FLOAT: ("FLOAT", torch.float32),
    TensorProto.FLOAT16: ("HALF", torch.float16),
    TensorProto.BFLOAT16: ("BF16", torch.bfloat16),
}


class CpuDevice(CudaDevice):
    """The CPU under the name of a GPU, with one stream of a made-up handle."""

    is_capturing = False

    def __init__(self, gpu: Gpu = H200) -> None:
        self.device = torch.device("cpu")
        self.gpu = gpu

    def guard(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        yield STREAM


def parse(trt: StrictModule, this: Any, model: bytes, path: str | None = None) -> bool:
    network = ModelProto.FromString(model)
    unknown = [node for node in network.graph.node if node.op_type not in DOCUMENTED]
    this._state["errors"] = [
        trt.make("ParserError", desc=f"No importer\nregistered for {node.op_type}", node=node) for node in unknown
    ]
    this._state["network"]._state["model"] = model
    return not unknown


def get_input(trt: StrictModule, this: Any, index: int) -> Any:
    return trt.make("ITensor", name=ModelProto.FromString(this._state["model"]).graph.input[index].name)


def add_profile(trt: StrictModule, this: Any, profile: Any) -> int:
    profiles = this._state.setdefault("profiles", [])
    profiles.append(profile._state["shapes"])
    return len(profiles) - 1


def set_shape(trt: StrictModule, this: Any, input: str, min: Any, opt: Any, max: Any) -> None:
    assert all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
    this._state["shapes"] = [min, opt, max]


def build(trt: StrictModule, this: Any, network: Any, config: Any) -> Any:
    monitor = config.progress_monitor
    monitor.phase_start("Building engine", None, 2)
    monitor.phase_start("Timing", "Building engine", 4)
    going = all(monitor.step_complete("Timing", step) for step in range(4))
    monitor.phase_finish("Timing")
    going = going and all(monitor.step_complete("Building engine", step) for step in range(2))
    monitor.phase_finish("Building engine")
    if not going or not config._state.get("profiles"):
        this._state["logger"].log(trt.ILogger.Severity.ERROR, "no profile\nor cancelled")
        return None
    config._state["cache"]._state["data"] += b"timed"
    header = json.dumps(config._state["profiles"]).encode() + b"\n"
    return trt.make("IHostMemory", data=MAGIC + header + network._state["model"])


def set_timing_cache(trt: StrictModule, this: Any, cache: Any, ignore_mismatch: bool) -> bool:
    this._state["cache"] = cache
    return not cache._state["data"] or cache._state["data"].startswith(b"timed")


def deserialize(trt: StrictModule, this: Any, serialized_engine: bytes) -> Any:
    if not serialized_engine.startswith(MAGIC):
        this._state["logger"].log(trt.ILogger.Severity.ERROR, "Serialization assertion magicTag failed")
        return None
    header, _, data = serialized_engine.removeprefix(MAGIC).partition(b"\n")
    model = ModelProto.FromString(data)
    graph = model.graph
    values = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    session = open_session(emulate_bf16(model))
    state = {"profiles": json.loads(header), "types": values, "session": session, "input": graph.input[0].name}
    return trt.make("ICudaEngine", **state)


def get_mode(trt: StrictModule, this: Any, name: str) -> Any:
    return trt.TensorIOMode.INPUT if name == this._state["input"] else trt.TensorIOMode.OUTPUT


def create_context(trt: StrictModule, this: Any, strategy: Any) -> Any:
    assert strategy is trt.ExecutionContextAllocationStrategy.USER_MANAGED
    return trt.make("IExecutionContext", engine=this._state, addresses={}, memory=0)


def set_profile(trt: StrictModule, this: Any, profile_index: int, stream_handle: int) -> bool:
    this._state["profile"] = this._state["engine"]["profiles"][profile_index]
    this._state["stream"] = stream_handle
    return True


def set_input_shape(trt: StrictModule, this: Any, name: str, shape: Sequence[int]) -> bool:
    low, _, high = this._state["profile"]
    this._state["shape"] = tuple(shape)
    return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def set_memory(trt: StrictModule, this: Any, memory: int, size: int) -> None:
    assert memory
    this._state["memory"] = size


def get_shape(trt: StrictModule, this: Any, name: str) -> tuple[int, ...]:
    return _outputs(this, np.zeros(this._state["shape"], np.float32))[name].shape


def set_address(trt: StrictModule, this: Any, name: str, memory: int) -> bool:
    this._state["addresses"][name] = memory
    return True


def execute(trt: StrictModule, this: Any, stream_handle: int) -> bool:
    state, engine = this._state, this._state["engine"]
    assert stream_handle == state["stream"] != 0
    assert state["memory"] >= SCRATCH_BYTES
    assert set(state["addresses"]) == set(engine["types"])
    value = _memory(state["addresses"][engine["input"]], state["shape"], engine["types"][engine["input"]])
    for name, output in _outputs(this, value.float().numpy()).items():
        target = _memory(state["addresses"][name], output.shape, engine["types"][name])
        target.copy_(torch.from_numpy(output))
    return True


def _outputs(this: Any, value: np.ndarray) -> dict[str, np.ndarray]:
    """ONNX Runtime's outputs by name; bfloat16 comes as float32."""
    return run(this._state["engine"]["session"], value)


def _memory(address: int, shape: Sequence[int], kind: int) -> torch.Tensor:
    dtype = TYPES[kind][1]
    raw = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(tuple(shape))


def _keep(**names: str) -> Any:
    """A constructor that keeps its arguments for the behaviours."""

    def construct(trt: StrictModule, this: Any, **given: Any) -> None:
        this._state.update({name: given[argument] for argument, name in names.items()})

    return construct


BEHAVIOURS: Behaviours = {
    "Builder.__init__": _keep(logger="logger"),
    "OnnxParser.__init__": _keep(network="network"),
    "Runtime.__init__": _keep(logger="logger"),
    "OnnxParser.parse": parse,
    "OnnxParser.num_errors": lambda trt, this: len(this._state["errors"]),
    "OnnxParser.get_error": lambda trt, this, index: this._state["errors"][index],
    "ParserError.desc": lambda trt, this: this._state["desc"],
    "ParserError.node_name": lambda trt, this: this._state["node"].name,
    "ParserError.node_operator": lambda trt, this: this._state["node"].op_type,
    "INetworkDefinition.get_input": get_input,
    "ITensor.name": lambda trt, this: this._state["name"],
    "IOptimizationProfile.set_shape": set_shape,
    "IBuilderConfig.add_optimization_profile": add_profile,
    "IBuilderConfig.create_timing_cache": lambda trt, this, serialized_timing_cache: trt.make(
        "ITimingCache", data=bytes(serialized_timing_cache)
    ),
    "IBuilderConfig.set_timing_cache": set_timing_cache,
    "ITimingCache.serialize": lambda trt, this: trt.make("IHostMemory", data=this._state["data"]),
    "Builder.build_serialized_network": build,
    "Runtime.deserialize_cuda_engine": deserialize,
    "ICudaEngine.num_io_tensors": lambda trt, this: len(this._state["types"]),
    "ICudaEngine.num_optimization_profiles": lambda trt, this: len(this._state["profiles"]),
    "ICudaEngine.device_memory_size_v2": lambda trt, this: SCRATCH_BYTES,
    "ICudaEngine.get_tensor_name": lambda trt, this, index: sorted(this._state["types"])[index],
    "ICudaEngine.get_tensor_mode": get_mode,
    "ICudaEngine.get_tensor_dtype": lambda trt, this, name: trt.DataType[TYPES[this._state["types"][name]][0]],
    "ICudaEngine.get_tensor_profile_shape": lambda trt, this, name, profile_index: this._state["profiles"][
        profile_index
    ],
    "ICudaEngine.create_execution_context": create_context,
    "IExecutionContext.set_optimization_profile_async": set_profile,
    "IExecutionContext.set_input_shape": set_input_shape,
    "IExecutionContext.set_device_memory": set_memory,
    "IExecutionContext.get_tensor_shape": get_shape,
    "IExecutionContext.set_tensor_address": set_address,
    "IExecutionContext.execute_async_v3": execute,
}


def make_double(surface: dict[str, Any]) -> StrictModule:
    module = StrictModule(surface, BEHAVIOURS)
    # The real one is a buffer; a class can be one itself only from Python 3.12 on.
    module.IHostMemory.__bytes__ = lambda this: this._state["data"]
    return module
