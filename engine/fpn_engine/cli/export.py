"""``fpn-engine export``: a trained checkpoint to one ONNX file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fpn_engine.cli.console import note, refuse_folder, steps, suggest
from fpn_engine.cli.options import (
    ClassesOption,
    MaxSizeOption,
    MinSizeOption,
    NmsOption,
    ScoreOption,
    SetOption,
    SpecOption,
    gather_overrides,
)
from fpn_engine.errors import FpnEngineError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth, .pt or .safetensors file.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: beside it, as .onnx.")] = None,
    spec: SpecOption = None,
    classes: ClassesOption = None,
    min_size: MinSizeOption = None,
    max_size: MaxSizeOption = None,
    score: ScoreOption = None,
    nms: NmsOption = None,
    set_: SetOption = None,
) -> None:
    """Turn a trained PyTorch checkpoint into one ONNX file that any ONNX Runtime runs by itself.

    Architecture, width and number of classes are read from the tensors. What they do not say comes from these options,
    then from NAME.json beside NAME.pth, then from torchvision's defaults; what was assumed is printed.
    """
    overrides = gather_overrides(classes, min_size, max_size, score, nms, set_)

    import onnx

    from fpn_engine.files import replacing
    from fpn_export.any_model import export_any, load_any

    refuse_folder(checkpoint)
    target = output or checkpoint.with_suffix(".onnx")
    if os.path.realpath(target) == os.path.realpath(checkpoint):
        raise FpnEngineError(f"the ONNX file would replace the checkpoint {checkpoint}; give another name with -o")
    with steps(f"exporting {checkpoint.name}") as step:
        step("read")
        loaded = load_any(checkpoint, spec_overrides=overrides, spec_path=spec)
        with replacing(target) as temporary:  # before the long work: a place that cannot be written shows at once
            model = export_any(loaded, on_progress=step)
            step("write")
            onnx.save(model, str(temporary))
    for sentence in loaded.assumptions:
        note(sentence)
    found = loaded.spec
    note(
        f"{target}: {found.model} {found.arch}, {found.describe_features()}, "
        f"{found.describe_results()}, {found.min_size}/{found.max_size} pixels, "
        f"{target.stat().st_size / 1e6:.1f} MB"
    )
    suggest("build", target)
