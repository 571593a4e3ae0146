"""``fpn-engine build``: an ONNX file to a plan for this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fpn_engine.cli.console import note, refuse_folder, steps


def build(
    model: Annotated[Path, typer.Argument(help="An ONNX file that fpn-engine export wrote.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: beside it, as .plan.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even if the plan is up to date.")] = False,
) -> None:
    """Cut a model into trunk and box head, optimise both for this machine and write the plan.

    A plan that is up to date is left as it is. An interrupted build leaves the old plan or none.
    """
    from fpn_engine.discovery import remember_plan
    from fpn_export.build import build_plan

    refuse_folder(model)
    start = time.perf_counter()
    with steps(f"building {model.name}") as step:
        built = build_plan(model, output or model.with_suffix(".plan"), force=force, on_progress=step)
    remember_plan(built.path)
    size = built.path.stat().st_size / 1e6
    if built.cached:
        note(f"{built.path} is up to date ({size:.1f} MB)")
    else:
        manifest = built.manifest
        note(
            f"{built.path}: {manifest.backend} {manifest.precision} on the {manifest.device.upper()}, {size:.1f} MB, "
            f"built in {time.perf_counter() - start:.1f} s"
        )
    note("next: fpn-engine infer image.jpg")
