"""``fpn-engine export``: a trained checkpoint to one ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fpn_engine.cli.console import note, steps
from fpn_engine.errors import SpecError


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
    overrides = {name: value for name, value in overrides.items() if value is not None} | _assignments(set_ or [])

    import onnx

    from fpn_engine.files import replacing
    from fpn_export.checkpoint import load_checkpoint
    from fpn_export.onnx_export import export_onnx

    target = output or checkpoint.with_suffix(".onnx")
    with steps(f"exporting {checkpoint.name}") as step:
        step("read")
        loaded = load_checkpoint(checkpoint, spec_overrides=overrides, spec_path=spec)
        model = export_onnx(loaded.model, loaded.spec, on_progress=step)
        step("write")
        with replacing(target) as temporary:
            onnx.save(model, str(temporary))
    for sentence in loaded.assumptions:
        note(sentence)
    found = loaded.spec
    note(
        f"{target}: {found.model} {found.arch}, pyramid of {found.fpn_channels} channels, "
        f"{len(found.categories)} classes, {found.min_size}/{found.max_size} pixels, "
        f"{target.stat().st_size / 1e6:.1f} MB"
    )
    note(f"next: fpn-engine build {target}")


def _categories(names: str | None) -> list[dict[str, Any]] | None:
    if names is None:
        return None
    return [{"id": number, "name": name.strip()} for number, name in enumerate(names.split(","), start=1)]


def _assignments(given: list[str]) -> dict[str, Any]:
    values = {}
    for assignment in given:
        key, sign, text = assignment.partition("=")
        if not sign:
            raise SpecError(f"--set wants KEY=JSON, not {assignment!r}; for example --set box_detections_per_img=300")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values
