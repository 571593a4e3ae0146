"""Trunk and box head of an ONNX Runtime plan for CUDA, on torch tensors without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_engine.backends import TrunkOutput
from fpn_engine.backends.ort import HEAD, TRUNK
from fpn_engine.backends.ort_binding import BoundSession, CudaPlace, Place
from fpn_engine.backends.ort_providers import ProviderChoice, open_gpu_session
from fpn_engine.errors import PlanError
from fpn_engine.plan import MAX_REASON, Manifest, Plan, rebuild_hint
from fpn_engine.spec import COARSEST_STAGE, ModelSpec

CHOICE = "provider.json"  # the part beside trunk and head
PRECISIONS = ("fp32", "fp16")


class OrtCudaTrunk:
    """The trunk: outputs NHWC by name, features in the network's type, objectness and deltas float32.

    ``captures`` is False: see :func:`fpn_engine.runtime.make_runner`.
    """

    captures = False

    def __init__(self, session: BoundSession, spec: ModelSpec) -> None:
        self._session, self._spec = session, spec

    def __call__(self, images: Tensor, /) -> TrunkOutput:
        n, _, height, width = images.shape
        shapes = trunk_shapes(self._spec, n, height, width)
        maps = {
            name.removesuffix("_nhwc"): value.permute(0, 3, 1, 2)
            for name, value in self._session(images, shapes).items()
        }

        def of(kind: str) -> tuple[Tensor, ...]:
            return tuple(maps[kind + level] for level in self._spec.level_names if kind + level in maps)

        return TrunkOutput(of(""), of("objectness_"), of("deltas_"))


class OrtCudaHead:
    """The box head on rows: (R, S * S * C) in NHWC order; float32 results."""

    captures = False

    def __init__(self, session: BoundSession, spec: ModelSpec) -> None:
        self._session, self._classes = session, spec.num_classes

    def __call__(self, roi_features: Tensor, /) -> tuple[Tensor, Tensor]:
        n = len(roi_features)
        shapes = {"class_logits": (n, self._classes), "box_deltas": (n, 4 * self._classes)}
        found = self._session(roi_features.permute(0, 2, 3, 1).flatten(1), shapes)
        return found["class_logits"], found["box_deltas"]


def trunk_shapes(spec: ModelSpec, n: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """(N, H, W, C) of each output that the trunk may have, for padded images of ``height`` x ``width``.

    Up to level 5 sides are divided by the stride, as padding allows; beyond, each level has half the cells, rounded up.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for level, name in zip(spec.levels, spec.level_names, strict=True):
        within = min(level, COARSEST_STAGE)
        cells = tuple(_halve(side >> within, level - within) for side in (height, width))
        widths = {"": spec.feature_channels, "objectness_": spec.num_anchors, "deltas_": 4 * spec.num_anchors}
        shapes |= {f"{kind}{name}_nhwc": (n, *cells, channels) for kind, channels in widths.items()}
    return shapes


def check_ort_cuda(manifest: Manifest) -> None:
    """Raise PlanError if an ONNX Runtime plan for CUDA does not fit this version.

    Its networks are plain ONNX, compiled when loaded, so that it is tied to no version of ONNX Runtime and to no GPU.
    """
    hint = rebuild_hint(manifest)
    if manifest.precision not in PRECISIONS:
        kind = f"onnxruntime {manifest.precision} on {manifest.device}"
        raise PlanError(f"the plan is for {kind}, which this version does not run; {hint}")
    needed = sorted([TRUNK, CHOICE, *([HEAD] if manifest.spec.has_box_head else [])])
    if sorted(manifest.parts) != needed:
        raise PlanError(f"the plan holds {sorted(manifest.parts)}, not {', '.join(needed)}; {hint}")


def load_ort_cuda(
    plan: Plan, threads: int | None = None, place: Place | None = None
) -> tuple[OrtCudaTrunk, OrtCudaHead | None]:
    """Make the parts of an ONNX Runtime plan for CUDA ready, by default on the current device.

    Raises: PlanError if the plan does not fit, BackendError if the provider cannot be loaded or leaves work to the CPU.
    """
    check_ort_cuda(plan.manifest)
    spec = plan.manifest.detector
    try:
        choice = ProviderChoice.from_json(plan.parts[CHOICE])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error)[:MAX_REASON]
        raise PlanError(f"the plan is damaged: {CHOICE}: {reason}; {rebuild_hint(plan.manifest)}") from None
    place = place or CudaPlace(torch.device("cuda"))
    half = plan.manifest.precision == "fp16"

    def bind(name: str, input_name: str) -> BoundSession:
        session = open_gpu_session(plan.parts[name], choice, place, input_name=input_name, half=half, threads=threads)
        return BoundSession(session, place)

    trunk = OrtCudaTrunk(bind(TRUNK, "image"), spec)
    return trunk, OrtCudaHead(bind(HEAD, "roi_rows"), spec) if spec.has_box_head else None


def _halve(cells: int, times: int) -> int:
    for _ in range(times):
        cells = (cells + 1) // 2
    return cells
