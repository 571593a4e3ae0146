"""``fpn-engine export``: a trained checkpoint to one ONNX file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fpn_engine.cli.console import note, refuse_folder, steps
from fpn_engine.cli.options import assignments
from fpn_engine.errors import FpnEngineError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth, .pt or .safetensors file.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: beside it, as .onnx.")] = None,
    spec: Annotated[
        Path | None, typer.Option(help="JSON file with what the tensors do not say; default NAME.json beside NAME.pth.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Class names in label order: cat,dog,bird.")] = None,
    min_size: Annotated[int | None, typer.Option(help="Pixels of the short side after resizing.")] = None,
    max_size: Annotated[int | None, typer.Option(help="Most pixels of the long side after resizing.")] = None,
    score: Annotated[float | None, typer.Option(min=0, max=1, help="Lowest score to report.")] = None,
    nms: Annotated[
        float | None, typer.Option(min=0, max=1, help="IoU above which a box yields to a better one.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=JSON", help="Any other field of the spec; repeatable.")
    ] = None,
) -> None:
    """Turn a trained PyTorch checkpoint into one ONNX file that any ONNX Runtime runs by itself.

    Architecture, width and number of classes are read from the tensors. What they do not say comes from these options,
    then from NAME.json beside NAME.pth, then from torchvision's defaults; what was assumed is printed.
    """
    overrides: dict[str, Any] = {
        "min_size": min_size,
        "max_size": max_size,
        "box_score_thresh": score,
        "box_nms_thresh": nms,
        "categories": _categories(classes),
    }
    overrides = {name: value for name, value in overrides.items() if value is not None} | assignments(set_ or [])

    import onnx

    from fpn_engine.files import replacing
    from fpn_export.checkpoint import load_checkpoint
    from fpn_export.onnx_export import export_onnx

    refuse_folder(checkpoint)
    target = output or checkpoint.with_suffix(".onnx")
    if os.path.realpath(target) == os.path.realpath(checkpoint):
        raise FpnEngineError(f"the ONNX file would replace the checkpoint {checkpoint}; give another name with -o")
    with steps(f"exporting {checkpoint.name}") as step:
        step("read")
        loaded = load_checkpoint(checkpoint, spec_overrides=overrides, spec_path=spec)
        with replacing(target) as temporary:  # before the long work: a place that cannot be written shows at once
            model = export_onnx(loaded.model, loaded.spec, on_progress=step)
            step("write")
            onnx.save(model, str(temporary))
    for sentence in loaded.assumptions:
        note(sentence)
    found = loaded.spec
    note(
        f"{target}: {found.model} {found.arch}, {found.describe_features()}, "
        f"{len(found.categories)} classes, {found.min_size}/{found.max_size} pixels, "
        f"{target.stat().st_size / 1e6:.1f} MB"
    )
    note(f"next: fpn-engine build {target}")


def _categories(names: str | None) -> list[dict[str, Any]] | None:
    if names is None:
        return None
    listed = [name.strip() for name in names.split(",")]
    if "" in listed or len(set(listed)) < len(listed):
        raise typer.BadParameter(f"{names!r} has an empty name or one twice", param_hint="--classes")
    return [{"id": number, "name": name} for number, name in enumerate(listed, start=1)]
