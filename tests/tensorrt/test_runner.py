"""The runtime: checks before anything is read, shapes, CUDA graphs, memory, and what is said when one is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
import torch

import fpn_engine.backends.tensorrt.bindings as bindings_module
import fpn_engine.backends.tensorrt.runner as runner_module
from fpn_engine.backends.tensorrt import load_tensorrt
from fpn_engine.backends.tensorrt.bindings import load_bindings
from fpn_engine.backends.tensorrt.device import CudaDevice
from fpn_engine.backends.tensorrt.target import Gpu, Target
from fpn_engine.errors import BackendError, PlanError
from fpn_engine.plan import Plan
from fpn_export.tensorrt.builder import BuildOptions
from fpn_export.tensorrt.profiles import Batches
from tests.export.random_system import make_images
from tests.tensorrt.conftest import Networks
from tests.tensorrt.double import CpuDevice
from tests.tensorrt.plans import build_small
from tests.tensorrt.strict import StrictModule

H200 = Gpu(name="NVIDIA H200", capability=(9, 0))
H100 = Gpu(name="NVIDIA H100", capability=(9, 0))
RTX_4090 = Gpu(name="NVIDIA GeForce RTX 4090", capability=(8, 9))
T4 = Gpu(name="Tesla T4", capability=(7, 5))
TARGET = Target(version="11.4.0.106", gpu=H200)


def changed(plan: Plan, **changes: Any) -> Plan:
    """The plan with other values in what it was built for."""
    values = json.loads(plan.parts["tensorrt.json"]) | changes
    return Plan(plan.manifest, plan.parts | {"tensorrt.json": json.dumps(values).encode()})


def test_a_target_is_read_as_it_was_written() -> None:
    target = dataclasses.replace(TARGET, hardware="ampere_plus", shapes={"trunk": [[[1, 3], [2, 3], [4, 3]]]})
    assert Target.from_json(target.to_json()) == target


@pytest.mark.parametrize(
    ("changes", "gpu", "fits"),
    [
        ({}, H200, True),
        ({}, H100, False),
        ({}, RTX_4090, False),
        ({"hardware": "same_compute_capability"}, H100, True),
        ({"hardware": "same_compute_capability"}, RTX_4090, False),
        ({"hardware": "ampere_plus"}, RTX_4090, True),
        ({"hardware": "ampere_plus"}, T4, False),
    ],
)
def test_a_plan_is_for_its_gpu(changes: dict[str, Any], gpu: Gpu, fits: bool) -> None:
    target = dataclasses.replace(TARGET, **changes)
    if fits:
        target.check(TARGET.version, gpu, "rebuild it")
    else:
        with pytest.raises(PlanError, match=rf"for the NVIDIA H200 \(compute capability 9.0\), but here .* {gpu.name}"):
            target.check(TARGET.version, gpu, "rebuild it")


def test_nothing_of_another_version_is_read(trt: StrictModule, small: Networks) -> None:
    plan = build_small(small, "fp32")
    trt.calls.clear()
    with pytest.raises(PlanError, match=r"built with TensorRT 9\.9\.9\.9, installed is 1.*; build it again with"):
        load_tensorrt(changed(plan, version="9.9.9.9"), CpuDevice())
    with pytest.raises(PlanError, match=r"built for the NVIDIA H200 .*, but here is the Tesla T4"):
        load_tensorrt(plan, CpuDevice(T4))
    assert trt.calls == []


def test_another_version_runs_by_its_lean_runtime(
    trt: StrictModule, small: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = changed(build_small(small, "fp32"), version="10.7.0.1", version_compatible=True)
    with pytest.raises(PlanError, match=r"set FPN_ENGINE_TENSORRT_LEAN to its libnvinfer_lean\.so"):
        load_tensorrt(plan, CpuDevice())
    monkeypatch.setenv("FPN_ENGINE_TENSORRT_LEAN", "/opt/libnvinfer_lean.so.10")
    trt.calls.clear()
    load_tensorrt(plan, CpuDevice())
    assert trt.calls[:4] == [
        "Runtime(logger=<Logger>)",
        "Runtime.engine_host_code_allowed = False",
        "Runtime.load_runtime(path='/opt/libnvinfer_lean.so.10')",
        "Runtime.engine_host_code_allowed = False",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"[]", "other keys"), (b"\xff", "cannot be read"), (b'{"version": "1"}', "other keys")],
)
def test_a_damaged_target(trt: StrictModule, small: Networks, data: bytes, message: str) -> None:
    plan = build_small(small, "fp32")
    with pytest.raises(PlanError, match=message):
        load_tensorrt(Plan(plan.manifest, plan.parts | {"tensorrt.json": data}), CpuDevice())
    with pytest.raises(PlanError, match="cannot be read"):
        load_tensorrt(changed(plan, gpu={"name": "x"}), CpuDevice())
    with pytest.raises(PlanError, match="wrong compatibility"):
        load_tensorrt(changed(plan, hardware="all"), CpuDevice())


def test_missing_parts(trt: StrictModule, small: Networks) -> None:
    plan = build_small(small, "fp32")
    parts = {name: part for name, part in plan.manifest.parts.items() if name != "head.engine"}
    with pytest.raises(PlanError, match=r"holds \['tensorrt.json', 'trunk.engine'\], not head.engine"):
        load_tensorrt(Plan(dataclasses.replace(plan.manifest, parts=parts), plan.parts), CpuDevice())


def test_a_foreign_engine_is_refused_in_one_sentence(trt: StrictModule, small: Networks) -> None:
    plan = build_small(small, "fp32")
    with pytest.raises(PlanError, match="cannot read the engine: Serialization assertion magicTag failed"):
        load_tensorrt(Plan(plan.manifest, plan.parts | {"head.engine": b"x"}), CpuDevice())


def test_more_images_than_the_plan_takes_are_run_in_pieces(trt: StrictModule, small: Networks) -> None:
    plan = build_small(small, "fp32", BuildOptions(batches=Batches(most=2)))
    trunk, head = load_tensorrt(plan, CpuDevice())
    images = make_images(5)
    out, alone = trunk(images), [trunk(images[i : i + 1]) for i in range(5)]
    assert sum("shape=(2, 3, 64, 96)" in line for line in trt.calls) == 1
    for level, value in enumerate(out.deltas):
        torch.testing.assert_close(value, torch.cat([each.deltas[level] for each in alone]), atol=1e-5, rtol=1e-5)
    assert head is not None
    class_logits, box_deltas = head(torch.zeros(0, 16, 7, 7))
    assert class_logits.shape == (0, 4)
    assert box_deltas.shape == (0, 16)


def test_a_size_outside_the_plan(trt: StrictModule, small: Networks) -> None:
    trunk, _ = load_tensorrt(build_small(small, "fp32"), CpuDevice())
    trunk(make_images(1, (96, 64)))  # upright, in the second profile
    assert "IExecutionContext.set_optimization_profile_async(profile_index=1, stream_handle=4711)" in trt.calls
    with pytest.raises(BackendError, match=r"1x3x32x64 to 8x3x64x128 or .*, not 1x3x160x64; build it again with other"):
        trunk(make_images(1, (160, 64)))


def test_shapes_of_a_cuda_graph_are_kept(trt: StrictModule, small: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "IDLE_CONTEXTS", 1)
    device = CpuDevice()
    trunk, _ = load_tensorrt(build_small(small, "fp32"), device)
    wide, tall, square = (make_images(1, size) for size in ((32, 64), (64, 32), (64, 64)))
    trunk(wide)
    device.is_capturing = True
    trunk(wide)
    with pytest.raises(BackendError, match="1x3x64x32 must run once before it is captured"):
        trunk(tall)
    device.is_capturing = False
    for images in (tall, square, wide, square, tall):
        trunk(images)
    contexts = [line for line in trt.calls if "create_execution_context" in line]
    assert len(contexts) == 4  # wide once and for good, square once, tall again after square took its place


def test_engines_share_one_piece_of_memory(trt: StrictModule, small: Networks) -> None:
    trunk, head = load_tensorrt(build_small(small, "fp32"), CpuDevice())
    trunk(make_images())
    assert head is not None
    head(torch.zeros(2, 16, 7, 7))
    lent = [line for line in trt.calls if "set_device_memory" in line]
    assert len(lent) == 2
    assert len(set(lent)) == 1
    (memory,) = trunk.buffers
    assert memory is head.buffers[0]
    assert f"memory={memory.data_ptr()}, size=4096" in lent[0]


FAILURES = {
    "IExecutionContext.execute_async_v3": "TensorRT failed while running the model: it gives no reason",
    "IExecutionContext.set_input_shape": "TensorRT does not take the shape 2x3x64x96",
    "ICudaEngine.create_execution_context": "TensorRT makes no execution context",
}


@pytest.mark.parametrize(("call", "message"), FAILURES.items())
def test_what_tensorrt_refuses(trt: StrictModule, small: Networks, call: str, message: str) -> None:
    trunk, _ = load_tensorrt(build_small(small, "fp32"), CpuDevice())
    trt._behaviours = {**trt._behaviours, call: lambda *args, **keywords: None}
    with pytest.raises(BackendError, match=message):
        trunk(make_images())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda_device(trt: StrictModule, small: Networks) -> None:
    with pytest.raises(BackendError, match="needs a CUDA device and there is none"):
        load_tensorrt(build_small(small, "fp32"))
    with pytest.raises(BackendError, match="needs a CUDA device"):
        CudaDevice()


class Finder:
    """Makes ``tensorrt`` and ``tensorrt_bindings`` fail to import with an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in ("tensorrt", "tensorrt_bindings"):
            error = self.error
            raise type(error)(*error.args, name=name) if isinstance(error, ModuleNotFoundError) else error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("none"), r"TensorRT is not installed; install it with: pip install 'fpn-engine\[tensorrt"),
        (
            ImportError("libnvinfer.so.11: cannot open shared object file"),
            r"TensorRT cannot be imported \(libnvinfer.so.11: .*\); see what is wrong with: fpn-engine doctor",
        ),
    ],
)
def test_tensorrt_missing_or_broken(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(error), *sys.meta_path])
    bindings_module.load_bindings.cache_clear()
    with pytest.raises(BackendError, match=message):
        load_bindings()


def test_tensorrt_too_old(trt: StrictModule) -> None:
    trt.__version__ = "10.6.0.26"
    bindings_module.load_bindings.cache_clear()
    with pytest.raises(BackendError, match=r"TensorRT 10.6.0.26 is too old, 10.7 or newer is needed"):
        load_bindings()
