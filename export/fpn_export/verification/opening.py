"""Opening: a checkpoint, an ONNX file or a plan as a subject."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor

from fpn_engine.backends import BoxHead, Trunk, TrunkOutput
from fpn_engine.backends.loading import load_parts
from fpn_engine.backends.ort import OrtHead, OrtTrunk
from fpn_engine.devices import choose_device
from fpn_engine.errors import FpnEngineError, ModelError
from fpn_engine.plan import Plan, read_plan
from fpn_engine.spec import ModelSpec
from fpn_export.checkpoint import load_checkpoint
from fpn_export.detector import FpnDetector
from fpn_export.file_kind import FileKind, find_kind
from fpn_export.onnx_cut import cut_head, cut_trunk
from fpn_export.onnx_file import read_onnx
from fpn_export.tensorrt.quantized_graph import quantized_precision
from fpn_export.verification.onnx_subject import OnnxSubject
from fpn_export.verification.subject import PipelineSubject, RunTrunk, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How files are opened.

    Attributes:
        spec_overrides, spec_path: of a checkpoint, as :func:`fpn_export.checkpoint.load_checkpoint` has them.
        cut: run an ONNX file as a plan is run: trunk and head by ONNX Runtime, the engine's kernels around them.
        device: of a plan. threads: of the CPU.
    """

    spec_overrides: Mapping[str, Any] = field(default_factory=dict)
    spec_path: Path | None = None
    cut: bool = False
    device: str | None = None
    threads: int | None = None


def open_subject(path: Path, options: OpenOptions | None = None) -> Subject:
    """The detector in ``path``, by its suffix or contents.

    Raises: FpnEngineError, one sentence, if it is none of them, damaged, or does not run here.
    """
    options = options or OpenOptions()
    if os.path.exists(path) and not os.path.isfile(path):
        raise FpnEngineError(f"{path} is not a file")
    kind = find_kind(path)
    if kind is FileKind.ONNX:
        return _open_onnx(path, options)
    if kind is FileKind.PLAN:
        return open_plan(path.name, read_plan(path), device=options.device, threads=options.threads)
    return _open_checkpoint(path, options)


def open_plan(
    name: str, plan: Plan, *, spec: ModelSpec | None = None, device: str | None = None, threads: int | None = None
) -> PipelineSubject:
    """A plan. Args: spec: instead of its own, with nothing else that the parts depend on."""
    manifest = plan.manifest
    where = choose_device(manifest, device)
    trunk, head = load_parts(plan, threads, where)
    return PipelineSubject(
        name=name,
        runtime=manifest.runtime,
        spec=spec or manifest.detector,
        precision=manifest.precision,
        run_trunk=_without_stages(trunk),
        head=head,
        device=where,
        input_dtype=getattr(trunk, "input_dtype", torch.float32),
    )


def open_cut(
    name: str, model: ModelProto, spec: ModelSpec, *, threads: int | None = None, run_spec: ModelSpec | None = None
) -> PipelineSubject:
    """An ONNX file's trunk and head in ONNX Runtime on the CPU, as they were cut. Args: run_spec: as open_plan's."""
    try:
        trunk = OrtTrunk(cut_trunk(model, spec).SerializeToString(), spec, threads)
        head: BoxHead | None = None
        if spec.has_box_head:
            head = OrtHead(cut_head(model, spec).SerializeToString(), threads)
    except (ModelError, ValueError) as error:  # onnx raises ValueError for a graph that hangs together badly
        raise ModelError(f"cannot cut {name}: {error}") from None
    precision = _precision_of(model)
    return PipelineSubject(
        name=name,
        runtime=f"cut, ONNX Runtime {precision} on the CPU",
        spec=run_spec or spec,
        precision=precision,
        run_trunk=_without_stages(trunk),
        head=head,
    )


def _open_onnx(path: Path, options: OpenOptions) -> Subject:
    model, spec = read_onnx(path)
    if options.cut:
        return open_cut(path.name, model, spec, threads=options.threads)
    precision = _precision_of(model)
    runtime = f"ONNX Runtime {precision} on the CPU"
    return OnnxSubject(model, spec, name=path.name, runtime=runtime, precision=precision, threads=options.threads)


def _open_checkpoint(path: Path, options: OpenOptions) -> PipelineSubject:
    loaded = load_checkpoint(path, spec_overrides=options.spec_overrides, spec_path=options.spec_path)
    detector = loaded.model
    return PipelineSubject(
        name=path.name,
        runtime="PyTorch fp32 on the CPU",
        spec=loaded.spec,
        precision="fp32",
        run_trunk=_with_stages(detector),
        head=detector.head if detector.has_box_head else None,
    )


def _with_stages(detector: FpnDetector) -> RunTrunk:
    def run(images: Tensor) -> tuple[tuple[Tensor, ...], TrunkOutput]:
        stages, levels = detector.pyramid(images)
        named = stages if detector.spec.pyramid != "none" else ()
        return named, TrunkOutput(levels, *detector.answer(levels))

    return run


def _without_stages(trunk: Trunk) -> RunTrunk:
    return lambda images: ((), trunk(images))


def _precision_of(model: ModelProto) -> str:
    return quantized_precision(model) or "fp32"
