"""Mask proposals on ONNX Runtime: trunk and windows' networks as sessions on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fpn_engine.backends.ort import TRUNK, check_ort, open_session, run_on_tensor
from fpn_engine.masks.pipeline import MaskTrunkOutput
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.plan import Plan
from fpn_kernels import gather_windows


class OrtMaskTrunk:
    """Images to levels and score logits; the session's outputs are NHWC, levels first."""

    def __init__(self, model: bytes, spec: MaskSpec, threads: int | None = None) -> None:
        self._session = open_session(model, threads)
        self._levels = len(spec.levels)

    def __call__(self, images: Tensor, /) -> MaskTrunkOutput:
        maps = tuple(level.permute(0, 3, 1, 2) for level in run_on_tensor(self._session, "image", images))
        return MaskTrunkOutput(maps[: self._levels], maps[self._levels :])


class OrtMaskAnswer:
    """Mask logits (R, S, S) at places: windows gathered, then a session."""

    def __init__(self, models: Sequence[bytes], spec: MaskSpec, threads: int | None = None) -> None:
        self._sessions = [open_session(model, threads) for model in models]
        self._spec = spec

    def __call__(self, number: int, features: Sequence[Tensor], places: Tensor) -> Tensor:
        size = self._spec.mask_size
        if len(places) == 0:
            return features[0].new_zeros(0, size, size)
        rows = gather_windows(features, places, self._spec.heads[number].kernel).flatten(1)
        (masks,) = run_on_tensor(self._sessions[number], "window_rows", rows)
        return masks.view(-1, size, size)


def load_ort_masks(plan: Plan, threads: int | None = None) -> tuple[OrtMaskTrunk, OrtMaskAnswer]:
    """Make the parts of a plan ready. Raises PlanError or BackendError if they do not fit."""
    check_ort(plan.manifest)
    spec = plan.manifest.spec
    assert isinstance(spec, MaskSpec)
    heads = [plan.parts[f"{name}.onnx"] for name in spec.head_names]
    return OrtMaskTrunk(plan.parts[TRUNK], spec, threads), OrtMaskAnswer(heads, spec, threads)
