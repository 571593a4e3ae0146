"""The parts of a TensorRT plan, checked and ready: trunk and box head."""

from __future__ import annotations

from torch import Tensor

from fpn_engine.backends import TrunkOutput
from fpn_engine.backends.tensorrt.bindings import load_bindings
from fpn_engine.backends.tensorrt.device import CudaDevice
from fpn_engine.backends.tensorrt.runner import EngineRunner, Scratch
from fpn_engine.backends.tensorrt.target import Target
from fpn_engine.errors import PlanError
from fpn_engine.plan import Manifest, Plan, rebuild_hint
from fpn_engine.spec import ModelSpec

TRUNK, HEAD, TARGET = "trunk.engine", "head.engine", "tensorrt.json"


class TensorRtTrunk:
    """The trunk: outputs NHWC by name, features in the engine's type, objectness and deltas float32."""

    def __init__(self, runner: EngineRunner, spec: ModelSpec) -> None:
        self._runner = runner
        self._levels = spec.level_names

    @property
    def buffers(self) -> list[Tensor]:
        return self._runner.buffers

    def __call__(self, images: Tensor, /) -> TrunkOutput:
        maps = {name.removesuffix("_nhwc"): value.permute(0, 3, 1, 2) for name, value in self._runner(images).items()}

        def of(kind: str) -> tuple[Tensor, ...]:
            return tuple(maps[kind + level] for level in self._levels if kind + level in maps)

        return TrunkOutput(of(""), of("objectness_"), of("deltas_"))


class TensorRtHead:
    """The box head on rows: (R, S * S * C) in NHWC order; float32 results."""

    def __init__(self, runner: EngineRunner) -> None:
        self._runner = runner

    @property
    def buffers(self) -> list[Tensor]:
        return self._runner.buffers

    def __call__(self, roi_features: Tensor, /) -> tuple[Tensor, Tensor]:
        found = self._runner(roi_features.permute(0, 2, 3, 1).flatten(1))
        return found["class_logits"], found["box_deltas"]


def load_tensorrt(plan: Plan, device: CudaDevice | None = None) -> tuple[TensorRtTrunk, TensorRtHead | None]:
    """Make the parts of a TensorRT plan ready, on the current CUDA device unless another is given.

    Raises: PlanError if the plan is for another TensorRT or GPU, BackendError if one of the two is not here.
    """
    runners = load_runners(plan, device)
    trunk = TensorRtTrunk(runners[TRUNK], plan.manifest.detector)
    return trunk, TensorRtHead(runners[HEAD]) if HEAD in runners else None


def load_runners(plan: Plan, device: CudaDevice | None = None) -> dict[str, EngineRunner]:
    """The engines of a plan by the names of its parts; raises as :func:`load_tensorrt`."""
    manifest = plan.manifest
    target = read_target(plan)
    bindings = load_bindings()
    device = device or CudaDevice()
    target.check(bindings.version, device.gpu, rebuild_hint(manifest))
    lean = target.version != bindings.version
    scratch = Scratch(device)
    return {name: EngineRunner(plan.parts[name], bindings, device, scratch, lean=lean) for name in _needed(manifest)}


def read_target(plan: Plan) -> Target:
    """What the plan was built for. Raises PlanError if its parts are not those of a TensorRT plan."""
    manifest = plan.manifest
    needed = sorted([*_needed(manifest), TARGET])
    if sorted(manifest.parts) != needed:
        found = f"the plan holds {sorted(manifest.parts)}, not {', '.join(needed)}"
        raise PlanError(f"{found}; {rebuild_hint(manifest)}")
    try:
        return Target.from_json(plan.parts[TARGET])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PlanError(f"the plan's {TARGET} cannot be read ({error}); {rebuild_hint(manifest)}") from None


def _needed(manifest: Manifest) -> list[str]:
    return [TRUNK, *(f"{name}.engine" for name in manifest.spec.head_names)]
