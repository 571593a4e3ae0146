"""Loading: the parts of a native plan made ready, after what is here was held against what it needs."""

from __future__ import annotations

import dataclasses
import importlib.util

import torch

from fpn_engine.backends.native.cpu_convolution import has_bfloat16
from fpn_engine.backends.native.cpu_quantized import has_int8_products
from fpn_engine.backends.native.packing import part_names, unpack_part
from fpn_engine.backends.native.parts import NativeHead, NativeTrunk
from fpn_engine.errors import BackendError, FpnEngineError, PlanError
from fpn_engine.plan import MAX_REASON, Manifest, Plan, rebuild_hint

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
NO_INT8 = "this torch has no int8 layers of oneDNN, or this processor no VNNI to add their products exactly"
OLDEST_GPU = 80  # compute capability times ten: bfloat16 on tensor cores, and what the kernels are compiled for


def check_native(manifest: Manifest) -> None:
    """Raise PlanError if a native plan does not fit what is here.

    Of torch no version is asked for: a plan holds operations and tensors, nothing that torch compiled. What is checked
    is that the processor convolves in the plan's precision.
    """
    on_gpu = manifest.device == "cuda"
    if (
        manifest.precision not in PRECISIONS
        or manifest.device not in ("cpu", "cuda")
        or (on_gpu and manifest.precision == "int8")
    ):
        kind = f"native {manifest.precision} on {manifest.device}"
        raise PlanError(f"the plan is for {kind}, which this version does not run; {rebuild_hint(manifest)}")
    if on_gpu:
        _check_cuda(manifest)
    elif manifest.precision == "int8" and not has_int8_products():
        elsewhere = rebuild_hint(dataclasses.replace(manifest, backend="onnxruntime"))
        raise PlanError(f"the plan is for int8 on the native backend, and {NO_INT8}; {elsewhere}")
    elif manifest.precision == "bf16" and not has_bfloat16():
        raise PlanError(
            "the plan is for bf16, which this processor or this torch cannot convolve in; "
            f"{rebuild_hint(manifest, precision='fp32')}"
        )
    names = part_names(manifest.spec, manifest.device)
    if sorted(manifest.parts) != sorted(names):
        raise PlanError(f"the plan holds {sorted(manifest.parts)}, not {', '.join(names)}; {rebuild_hint(manifest)}")


def check_int8() -> None:
    """Raise BackendError if this processor or this torch has no products of 8 bits that add up without saturation."""
    if not has_int8_products():
        raise BackendError(f"{NO_INT8}; build with --backend onnxruntime")


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
    spec = plan.manifest.detector
    try:
        make = None
        if plan.manifest.device == "cuda":
            from fpn_engine.backends.native.cuda.loading import prepare

            make = prepare(plan)
        trunk = NativeTrunk(*unpack_part("trunk", plan.parts), spec, threads, make)
        head = NativeHead(*unpack_part("head", plan.parts), spec, threads, make) if spec.has_box_head else None
    except (ValueError, RuntimeError) as error:
        raise explain_failure(plan.manifest, error) from error
    return trunk, head


def explain_failure(manifest: Manifest, error: ValueError | RuntimeError) -> FpnEngineError:
    """What to say of an error while a plan was loaded: the plan's fault, or the CUDA device's."""
    reason = str(error)[:MAX_REASON]
    if manifest.device == "cuda" and isinstance(error, RuntimeError):
        return BackendError(f"the CUDA device failed while the plan was loaded: {reason}")
    return PlanError(f"the plan is damaged: {reason}; {rebuild_hint(manifest)}")
