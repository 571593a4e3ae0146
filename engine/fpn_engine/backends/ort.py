"""ONNX Runtime: the two neural parts as two sessions, NHWC at the seam so that nothing is copied between them.

A plan also holds the joints, which make the whole detector of the two: see :mod:`fpn_engine.light`, for whose sake
torch is imported only where it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fpn_engine.backends import TrunkOutput
from fpn_engine.errors import BackendError, PlanError
from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_engine.plan import Manifest, Plan, rebuild_hint
from fpn_engine.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

TRUNK, HEAD = "trunk.onnx", "head.onnx"
ROIS, DETECTIONS = "rois.onnx", "detections.onnx"  # the joints; see fpn_export.onnx_joints
PROVIDERS = ["CPUExecutionProvider"]
_ERRORS_ONLY = 3  # ONNX Runtime's log level; its warnings are about its own optimiser


def runtime_version() -> str:
    """The installed version; plans are tied to its first two numbers."""
    import onnxruntime as ort

    return str(ort.__version__)


def session_options(threads: int | None = None) -> Any:
    """Options for a session: ``threads`` None takes one per physical core; no more are taken than there are cores."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # Its threads would spin on for a while after a run, on the cores that the ops in between need.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = min(threads, os.cpu_count() or threads)
    return options


def open_session(model: bytes, threads: int | None = None) -> Any:
    """A session on the CPU. Raises BackendError if ONNX Runtime refuses the model."""
    import onnxruntime as ort

    try:
        return ort.InferenceSession(model, session_options(threads), providers=PROVIDERS)
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise BackendError(f"ONNX Runtime {ort.__version__} cannot load the model: {error}") from None


def run_session(session: Any, values: Mapping[str, Any]) -> list[Any]:
    """The outputs of a session for arrays by name. Raises BackendError if ONNX Runtime fails."""
    try:
        outputs: list[Any] = session.run(None, values)
    except Exception as error:
        raise BackendError(f"ONNX Runtime failed while running the model: {error}") from None
    return outputs


def run_on_tensor(session: Any, name: str, value: Tensor) -> list[Tensor]:
    """The outputs of a session for one tensor."""
    import torch

    return [torch.from_numpy(output) for output in run_session(session, {name: value.contiguous().numpy()})]


class OrtTrunk:
    """The trunk: outputs NHWC in the order features, objectness, deltas; see ``fpn_export.onnx_cut``."""

    def __init__(self, model: bytes, spec: ModelSpec, threads: int | None = None) -> None:
        self._session = open_session(model, threads)
        self._levels = len(spec.levels) if spec.has_rpn else 0

    def __call__(self, images: Tensor, /) -> TrunkOutput:
        maps = tuple(level.permute(0, 3, 1, 2) for level in run_on_tensor(self._session, "image", images))
        split = len(maps) - 2 * self._levels
        return TrunkOutput(maps[:split], maps[split : split + self._levels], maps[split + self._levels :])


class OrtHead:
    """The box head on rows: (R, S * S * C) in NHWC order."""

    def __init__(self, model: bytes, threads: int | None = None) -> None:
        self._session = open_session(model, threads)

    def __call__(self, roi_features: Tensor, /) -> tuple[Tensor, Tensor]:
        rows = roi_features.permute(0, 2, 3, 1).flatten(1)
        class_logits, box_deltas = run_on_tensor(self._session, "roi_rows", rows)
        return class_logits, box_deltas


def part_names(spec: AnySpec) -> list[str]:
    """The parts of a plan in the order in which they run."""
    if isinstance(spec, MaskSpec):  # without joints: what lies between its networks needs torch
        return [TRUNK, *(f"{name}.onnx" for name in spec.head_names)]
    return [TRUNK, ROIS, HEAD, DETECTIONS] if spec.has_box_head else [TRUNK, DETECTIONS]


def check_ort(manifest: Manifest) -> None:
    """Raise PlanError, naming the field, if an ONNX Runtime plan does not fit what is here.

    It is tied to the first two numbers of ONNX Runtime's version, whose optimiser wrote the graphs.
    """
    installed = runtime_version()
    built = manifest.versions.get("onnxruntime", "none")
    rebuild = rebuild_hint(manifest)
    if manifest.precision not in ("fp32", "int8") or manifest.device != "cpu":
        kind = f"{manifest.backend} {manifest.precision} on {manifest.device}"
        raise PlanError(f"the plan is for {kind}, which this version does not run; {rebuild}")
    if built.split(".")[:2] != installed.split(".")[:2]:
        raise PlanError(f"the plan was built with onnxruntime {built}, installed is {installed}; {rebuild}")
    needed = part_names(manifest.spec)
    if sorted(manifest.parts) != sorted(needed):
        raise PlanError(f"the plan holds {sorted(manifest.parts)}, not {' and '.join(sorted(needed))}; {rebuild}")


def load_ort(plan: Plan, threads: int | None = None) -> tuple[OrtTrunk, OrtHead | None]:
    """Make the parts of an ONNX Runtime plan ready. Raises PlanError or BackendError if they do not fit."""
    check_ort(plan.manifest)
    spec = plan.manifest.detector
    trunk = OrtTrunk(plan.parts[TRUNK], spec, threads)
    return trunk, OrtHead(plan.parts[HEAD], threads) if spec.has_box_head else None
