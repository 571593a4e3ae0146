"""Mask proposals on TensorRT: trunk and windows' networks as engines; windows are gathered by fpn_kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fpn_engine.backends.tensorrt.device import CudaDevice
from fpn_engine.backends.tensorrt.parts import TRUNK, load_runners
from fpn_engine.backends.tensorrt.runner import EngineRunner
from fpn_engine.masks.pipeline import MaskTrunkOutput
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.plan import Plan
from fpn_kernels import gather_windows


class TensorRtMaskTrunk:
    """Images to levels and score logits; the engine's outputs are NHWC by name."""

    def __init__(self, runner: EngineRunner, spec: MaskSpec) -> None:
        self._runner, self._levels = runner, spec.level_names

    @property
    def buffers(self) -> list[Tensor]:
        return self._runner.buffers

    def __call__(self, images: Tensor, /) -> MaskTrunkOutput:
        maps = {name: value.permute(0, 3, 1, 2) for name, value in self._runner(images).items()}
        features, scores = (tuple(maps[f"{kind}{level}_nhwc"] for level in self._levels) for kind in ("", "scores_"))
        return MaskTrunkOutput(features, scores)


class TensorRtMaskAnswer:
    """Mask logits (R, S, S) at places."""

    def __init__(self, runners: Sequence[EngineRunner], spec: MaskSpec) -> None:
        self._runners, self._spec = runners, spec

    def __call__(self, number: int, features: Sequence[Tensor], places: Tensor) -> Tensor:
        rows = gather_windows(features, places, self._spec.heads[number].kernel).flatten(1)
        size = self._spec.mask_size
        return self._runners[number](rows)["window_masks"].view(-1, size, size)


def load_tensorrt_masks(plan: Plan, device: CudaDevice | None = None) -> tuple[TensorRtMaskTrunk, TensorRtMaskAnswer]:
    """Make the parts of a plan ready; as :func:`fpn_engine.backends.tensorrt.parts.load_tensorrt`."""
    spec = plan.manifest.spec
    assert isinstance(spec, MaskSpec)
    runners = load_runners(plan, device)
    heads = [runners[f"{name}.engine"] for name in spec.head_names]
    return TensorRtMaskTrunk(runners[TRUNK], spec), TensorRtMaskAnswer(heads, spec)
