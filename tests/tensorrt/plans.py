"""Plans of the small detector, built by whatever TensorRT is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import ModelProto

from fpn_engine.plan import Manifest, Part, Plan
from fpn_export.tensorrt.builder import BuildOptions
from fpn_export.tensorrt.parts import make_tensorrt_parts
from tests.tensorrt.double import CpuDevice
from tests.tensorrt.quantization import quantize


def quantize_parts(networks: Any, precision: str) -> dict[str, ModelProto]:
    """The parts as ``precision`` needs them: quantised for int8 and fp8."""
    if precision not in ("int8", "fp8"):
        return dict(networks.parts)
    return {name: quantize(part, precision) for name, part in networks.parts.items()}


def build_small(networks: Any, precision: str, options: BuildOptions | None = None, device: Any = None) -> Plan:
    parts = make_tensorrt_parts(
        Path("model.onnx"),
        quantize_parts(networks, precision),
        networks.spec,
        precision,
        options or BuildOptions(),
        lambda step: None,
        device or CpuDevice(),
    )
    manifest = Manifest(
        spec=networks.spec,
        backend="tensorrt",
        precision=precision,
        device="cuda",
        versions={},
        build_key="",
        source="model.onnx",
        parts={name: Part(sha256="", size=len(data)) for name, data in parts.items()},
    )
    return Plan(manifest, parts)
