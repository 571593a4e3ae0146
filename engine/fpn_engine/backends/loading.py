"""Loading: the trunk and box head of a plan, by the backend that it names."""

from __future__ import annotations

import contextlib

import torch

from fpn_engine.backends import BoxHead, Trunk
from fpn_engine.errors import PlanError
from fpn_engine.plan import Plan, rebuild_hint

BACKENDS = ("onnxruntime", "native", "tensorrt")


def load_parts(
    plan: Plan, threads: int | None = None, device: torch.device | None = None
) -> tuple[Trunk, BoxHead | None]:
    """Make both neural parts ready; an RPN alone has no box head.

    Args:
        threads: CPU threads, None takes one per core.
        device: for a CUDA plan, the device that is the current one while its parts are made; None leaves it.
    Raises: PlanError if the plan was built for something else than what is here.
    """
    is_cuda = device is not None and device.type == "cuda"
    with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():
        return _load_parts(plan, threads)


def _load_parts(plan: Plan, threads: int | None) -> tuple[Trunk, BoxHead | None]:
    manifest = plan.manifest
    if manifest.backend == "onnxruntime" and manifest.device == "cuda":
        from fpn_engine.backends.ort_cuda import load_ort_cuda

        return load_ort_cuda(plan, threads)
    if manifest.backend == "onnxruntime":
        from fpn_engine.backends.ort import load_ort

        return load_ort(plan, threads)
    if manifest.backend == "native":
        from fpn_engine.backends.native import load_native

        return load_native(plan, threads)
    if manifest.backend == "tensorrt":
        from fpn_engine.backends.tensorrt import load_tensorrt

        return load_tensorrt(plan)
    kind = f"{manifest.backend} {manifest.precision} on {manifest.device}"
    raise PlanError(f"the plan is for {kind}, which this version does not run; {rebuild_hint(manifest)}")
