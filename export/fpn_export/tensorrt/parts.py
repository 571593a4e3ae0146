"""The parts of a plan for TensorRT: engines, and what they were built for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
from onnx import ModelProto

from fpn_engine.backends.tensorrt.bindings import load_bindings
from fpn_engine.backends.tensorrt.device import CudaDevice
from fpn_engine.backends.tensorrt.parts import TARGET
from fpn_engine.backends.tensorrt.target import VERSION_KEY, Target
from fpn_engine.errors import BackendError, ModelError
from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_export.tensorrt.builder import BuildOptions, build_engine
from fpn_export.tensorrt.profiles import Profile, image_profiles, roi_profile, window_profile
from fpn_export.tensorrt.timing_cache import TimingCache
from fpn_export.tensorrt.typed_graph import PRECISIONS, type_graph


def make_tensorrt_parts(
    path: Path,
    networks: Mapping[str, ModelProto],
    spec: AnySpec,
    precision: str,
    options: BuildOptions,
    on_progress: Callable[[str], None],
    device: CudaDevice | None = None,
) -> dict[str, bytes]:
    """Build engines of trunk and head, which were cut out of ``path``, for the current CUDA device.

    Raises: BackendError without TensorRT or a device, or for options that do not go together; ModelError if the
    networks do not fit the precision or the parser refuses one.
    """
    if precision not in PRECISIONS:
        raise BackendError(f"TensorRT builds no {precision}; take one of {', '.join(PRECISIONS)}")
    bindings = load_bindings()
    device = device or CudaDevice()
    profiles = {"trunk": image_profiles(spec, options.batches, options.sizes)}
    if isinstance(spec, MaskSpec):
        profiles |= {name: [window_profile(spec, n, options.batches)] for n, name in enumerate(spec.head_names)}
    elif "head" in networks:
        profiles["head"] = [roi_profile(spec, options.batches)]
    timing = TimingCache(bindings.version, device.gpu)
    parts = {}
    for name, network in networks.items():
        on_progress(f"type {name}")
        typed = _typed(path, network, precision)

        def say(line: str, name: str = name) -> None:
            on_progress(f"build {name}: {line}")

        with device.guard():
            parts[f"{name}.engine"] = build_engine(
                typed, profiles[name], bindings, options, exact=precision == "fp32", timing=timing, on_progress=say
            )
    target = Target(
        version=bindings.version,
        gpu=device.gpu,
        version_compatible=options.version_compatible,
        hardware=options.hardware,
        shapes={name: [_lists(profile) for profile in each] for name, each in profiles.items()},
    )
    return parts | {TARGET: target.to_json()}


def describe_target(parts: Mapping[str, bytes]) -> dict[str, str]:
    """What the manifest says of the engines: TensorRT's version, the GPU, and where else they run."""
    target = Target.from_json(parts[TARGET])
    major, minor = target.gpu.capability
    return {
        VERSION_KEY: target.version,
        "gpu": target.gpu.name,
        "compute capability": f"{major}.{minor}",
        "hardware compatibility": target.hardware + (", any version" if target.version_compatible else ""),
    }


def _typed(path: Path, network: ModelProto, precision: str) -> bytes:
    try:
        return type_graph(network, precision).SerializeToString()
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{path} cannot be made {precision} ({reason}); export it again") from None


def _lists(profile: Profile) -> list[list[int]]:
    return [list(shape) for shape in profile]
