"""``fpn-engine info``: what a file is and what it needs."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpn_engine.cli.console import emit, refuse_folder, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fpn_engine.masks.spec import AnySpec
    from fpn_engine.plan import Plan
    from fpn_engine.spec import ModelSpec

ORDINARY = (480, 640)  # the shape of most photographs


def info(
    file: Annotated[Path, typer.Argument(help="A checkpoint, an ONNX file or a plan.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON on stdout.")] = False,
) -> None:
    """Say what a checkpoint, ONNX file or plan is, what it detects and what it needs."""
    facts = _describe(file)
    if json:
        emit(json_module.dumps(facts, indent=1))
        return
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("name", Column("value", overflow="fold"), show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _rows(facts):
        table.add_row(Text(name, style="bold"), Text(value))
    show(table)


def _describe(path: Path) -> dict[str, Any]:
    refuse_folder(path)
    from fpn_export.any_model import describe_any
    from fpn_export.file_kind import FileKind, find_kind

    kind = find_kind(path)
    if kind is FileKind.ONNX:
        return _describe_onnx(path)
    return _describe_plan(path) if kind is FileKind.PLAN else describe_any(path)


def _describe_plan(path: Path) -> dict[str, Any]:
    from fpn_engine.plan import read_plan

    plan = read_plan(path)
    manifest = plan.manifest
    return {
        "kind": "plan",
        "file": str(path),
        "bytes": path.stat().st_size,
        "format_version": manifest.format_version,
        "backend": manifest.backend,
        "precision": manifest.precision,
        "device": manifest.device,
        "built with": manifest.versions,
        "built from": manifest.source,
        **({"trunk memory": _describe_memory(plan)} if manifest.backend == "native" else {}),
        "spec": manifest.spec.to_dict(),
    }


def _describe_memory(plan: Plan) -> dict[str, Any]:
    """Bytes of what lies between the image of one ordinary photograph and the maps."""
    from fpn_engine.backends.native.parts import plan_trunk_memory
    from fpn_engine.errors import PlanError
    from fpn_engine.plan import rebuild_hint
    from fpn_engine.resizing import padded_size, resized_size

    spec = plan.manifest.spec
    size = padded_size(resized_size(*ORDINARY, spec.min_size, spec.max_size), spec.size_divisor)
    try:
        memory = plan_trunk_memory(plan, 1, size)
    except ValueError as error:
        raise PlanError(f"the plan is damaged: {error}; {rebuild_hint(plan.manifest)}") from None
    return {"height": size[0], "width": size[1], "bytes": memory.arena_bytes, "without reuse": memory.total_bytes}


def _describe_onnx(path: Path) -> dict[str, Any]:
    from fpn_export.onnx_file import read_any_onnx

    model, spec = read_any_onnx(path)
    return {
        "kind": "ONNX model",
        "file": str(path),
        "bytes": path.stat().st_size,
        "opset": max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        "ir_version": model.ir_version,
        "written by": f"{model.producer_name} {model.producer_version}",
        "nodes": len(model.graph.node),
        "inputs": [value.name for value in model.graph.input],
        "outputs": [value.name for value in model.graph.output],
        "spec": spec.to_dict(),
    }


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What people want to know first; --json has the rest."""
    from fpn_engine.masks.spec import read_spec

    spec, made = facts["spec"], read_spec(facts["spec"])
    rows = [(facts["kind"], facts["file"]), ("size", f"{facts['bytes'] / 1e6:.1f} MB")]
    if facts["kind"] == "checkpoint":
        rows.append(("sha256", facts["sha256"]))
        rows.append(("parameters", f"{facts['parameters'] / 1e6:.1f} million"))
    elif facts["kind"] == "plan":
        rows.append(("runs on", f"{facts['backend']} {facts['precision']}, {facts['device'].upper()}"))
        rows.append(("built with", ", ".join(f"{name} {version}" for name, version in facts["built with"].items())))
        rows.append(("built from", facts["built from"]))
        if memory := facts.get("trunk memory"):
            size = f"{memory['height']} x {memory['width']}"
            used, whole = (f"{memory[key] / 1e6:.1f} MB" for key in ("bytes", "without reuse"))
            rows.append(("trunk buffers", f"{used} for one image of {size}, {whole} if none were used again"))
    else:
        rows.append(("format", f"opset {facts['opset']}, IR {facts['ir_version']}, {facts['nodes']} nodes"))
        rows.append(("written by", facts["written by"]))
        rows.append(("inputs", ", ".join(facts["inputs"])))
        rows.append(("outputs", ", ".join(facts["outputs"])))
    rows += [
        ("model", f"{spec['model']} {spec['arch']}, {made.describe_features()}"),
        ("classes", ", ".join(f"{category.id} {category.name}" for category in made.categories)),
        ("image size", f"short side {spec['min_size']}, long side at most {spec['max_size']} pixels"),
        ("normalisation", f"{spec['channel_order'].upper()}, mean {spec['image_mean']}, std {spec['image_std']}"),
        *_result_rows(made),
    ]
    if facts["kind"] != "checkpoint":
        rows.append(("trained as", spec["source"] or "unknown"))
    for number, sentence in enumerate(facts.get("needs", [])):
        rows.append(("to be stated" if number == 0 else "", sentence))
    return rows


def _result_rows(spec: AnySpec) -> list[tuple[str, str]]:
    from fpn_engine.masks.spec import MaskSpec

    if isinstance(spec, MaskSpec):
        sizes = [f"{spec.object_size(head, level):.0f}" for level in spec.levels for head in spec.heads]
        return [
            ("masks", spec.describe_results()),
            ("objects", f"of {', '.join(sizes)} pixels"),
            ("most masks", f"{spec.masks_per_img} per image"),
        ]
    return [
        ("anchors", f"sizes {_listed(spec.anchor_sizes)}, ratios {list(spec.aspect_ratios)}"),
        *_head_rows(spec),
        ("most boxes", f"{spec.box_detections_per_img} per image"),
    ]


def _listed(sizes: Sequence[Sequence[float]]) -> list[list[float]]:
    return [list(row) for row in sizes]


def _head_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    if not spec.has_box_head:
        return [("thresholds", f"score {spec.rpn_score_thresh}, NMS {spec.rpn_nms_thresh}")]
    pool = spec.box_roi_pool
    size = f"{pool.output_size} x {pool.output_size}"
    samples = f"{pool.sampling_ratio or 'adaptive'} samples"
    pooling = f"RoIPool {size}" if pool.kind == "max" else f"RoIAlign {size}, {samples}"
    return [
        ("box head", f"{spec.box_head} on {pooling}"),
        ("thresholds", f"score {spec.box_score_thresh}, NMS {spec.box_nms_thresh}"),
    ]
