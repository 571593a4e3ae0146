"""Loading: the trunk and box head of a plan, by the backend that it names."""

from __future__ import annotations

import contextlib

import torch

from fpn_engine.backends import BoxHead, Trunk
from fpn_engine.errors import PlanError
from fpn_engine.masks.pipeline import MaskAnswer, MaskPipeline, MaskTrunk
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.pipeline import Pipeline
from fpn_engine.plan import Manifest, Plan, rebuild_hint

BACKENDS = ("onnxruntime", "native", "tensorrt")


def load_pipeline(
    plan: Plan, threads: int | None = None, device: torch.device | None = None
) -> Pipeline | MaskPipeline:
    """Both kinds of models, their parts as :func:`load_parts` and :func:`load_mask_parts` have them."""
    spec, place = plan.manifest.spec, device or torch.device("cpu")
    if isinstance(spec, MaskSpec):
        return MaskPipeline(spec, *load_mask_parts(plan, threads, device), place)
    return Pipeline(spec, *load_parts(plan, threads, device), place)


def load_mask_parts(
    plan: Plan, threads: int | None = None, device: torch.device | None = None
) -> tuple[MaskTrunk, MaskAnswer]:
    """Make the trunk and the windows' networks of a mask-proposal model ready; as :func:`load_parts`."""
    with _current(device):
        if plan.manifest.backend == "onnxruntime":
            from fpn_engine.backends.ort_masks import load_ort_masks

            return load_ort_masks(plan, threads)
        if plan.manifest.backend == "native":
            from fpn_engine.backends.native.masks import load_native_masks

            return load_native_masks(plan, threads)
        if plan.manifest.backend == "tensorrt":
            from fpn_engine.backends.tensorrt.masks import load_tensorrt_masks

            return load_tensorrt_masks(plan)
    raise _unknown(plan.manifest)


def load_parts(
    plan: Plan, threads: int | None = None, device: torch.device | None = None
) -> tuple[Trunk, BoxHead | None]:
    """Make both neural parts ready; an RPN alone has no box head.

    Args:
        threads: CPU threads, None takes one per core.
        device: for a CUDA plan, the device that is the current one while its parts are made; None leaves it.
    Raises: PlanError if the plan was built for something else than what is here.
    """
    with _current(device):
        return _load_parts(plan, threads)


def _current(device: torch.device | None) -> contextlib.AbstractContextManager[object]:
    """The device as the current one, if it is a CUDA device."""
    is_cuda = device is not None and device.type == "cuda"
    return torch.cuda.device(device) if is_cuda else contextlib.nullcontext()


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
    raise _unknown(manifest)


def _unknown(manifest: Manifest) -> PlanError:
    kind = f"{manifest.backend} {manifest.precision} on {manifest.device}"
    return PlanError(f"the plan is for {kind}, which this version does not run; {rebuild_hint(manifest)}")
