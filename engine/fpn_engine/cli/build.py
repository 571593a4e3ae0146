"""``fpn-engine build``: an ONNX file or a named model to a plan for this machine."""

from __future__ import annotations

import enum
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from fpn_engine.cli.console import note, refuse_folder, steps
from fpn_engine.cli.options import ModelOption
from fpn_engine.cli.plans import plan_of_model


class Backend(enum.StrEnum):
    """What runs trunk and head."""

    auto = "auto"
    onnxruntime = "onnxruntime"
    native = "native"


class Precision(enum.StrEnum):
    """Number type of trunk and head."""

    fp32 = "fp32"
    bf16 = "bf16"


def build(
    onnx: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="An ONNX file that fpn-engine export wrote.", show_default=False),
    ] = None,
    model: ModelOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: beside it, as .plan; NAME.plan for a named model.")
    ] = None,
    backend: Annotated[
        Backend, typer.Option(help="What runs the plan; auto times onnxruntime and native here and takes the faster.")
    ] = Backend.auto,
    precision: Annotated[
        Precision, typer.Option(help="Number type of trunk and head; bf16 runs on the native backend.")
    ] = Precision.fp32,
    force: Annotated[bool, typer.Option("--force", help="Build even if the plan is up to date.")] = False,
) -> None:
    """Cut a model into trunk and box head, optimise both for this machine and write the plan.

    A plan that is up to date is left as it is. An interrupted build leaves the old plan or none.
    """
    from fpn_engine.discovery import remember_plan

    start = time.perf_counter()
    if onnx is not None and model is None:
        path, what = _build_file(onnx, output or onnx.with_suffix(".plan"), backend, precision, force)
    elif model is not None and onnx is None:
        path, what = _build_named(model, output, backend, precision, force)
    else:
        raise typer.BadParameter("give an ONNX file or --model NAME, one of the two", param_hint="MODEL")
    remember_plan(path)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    if what:
        note(f"{path}: {what}, {size}, built in {time.perf_counter() - start:.1f} s")
    else:
        note(f"{path} is up to date ({size})")
    note("next: fpn-engine infer image.jpg")


def _build_file(onnx: Path, plan: Path, backend: str, precision: str, force: bool) -> tuple[Path, str]:
    """The plan, and what it is if it was built."""
    from fpn_export.build import build_plan

    refuse_folder(onnx)
    with steps(f"building {onnx.name}") as step:
        built = build_plan(
            onnx, plan, backend=backend, precision=precision, force=force, on_progress=step, on_note=note
        )
    return built.path, "" if built.cached else built.manifest.runtime


def _build_named(name: str, output: Path | None, backend: str, precision: str, force: bool) -> tuple[Path, str]:
    """A copy of the cached plan."""
    from fpn_engine.files import replacing
    from fpn_engine.named import find_model
    from fpn_engine.plan import read_plan

    plan = output or Path(f"{find_model(name).name}.plan")
    cached = plan_of_model(name, backend=backend, precision=precision, force=force)
    with replacing(plan) as temporary:
        shutil.copyfile(cached, temporary)
    return plan, read_plan(plan).manifest.runtime
