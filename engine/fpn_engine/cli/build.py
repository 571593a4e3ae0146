"""``fpn-engine build``: an ONNX file or a named model to a plan for this machine."""

from __future__ import annotations

import enum
import os
import re
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fpn_engine.cli.console import note, refuse_folder, steps, suggest
from fpn_engine.cli.options import ModelOption
from fpn_engine.cli.plans import ForCuda, checkpoint_of_model, plan_of_model


class Backend(enum.StrEnum):
    """What runs trunk and head."""

    auto = "auto"
    onnxruntime = "onnxruntime"
    native = "native"
    tensorrt = "tensorrt"


class Precision(enum.StrEnum):
    """Number type of trunk and head."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    fp8 = "fp8"


class Device(enum.StrEnum):
    """What the plan runs on."""

    cpu = "cpu"
    cuda = "cuda"


class Provider(enum.StrEnum):
    """What ONNX Runtime runs on a GPU with."""

    cuda = "cuda"
    tensorrt = "tensorrt"


class Tactics(enum.StrEnum):
    """How many implementations of each layer are measured."""

    quick = "quick"
    full = "full"


class Hardware(enum.StrEnum):
    """On which other GPUs a TensorRT engine runs."""

    none = "none"
    same_compute_capability = "same_compute_capability"
    ampere_plus = "ampere_plus"


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
        Precision | None,
        typer.Option(
            help="Number type of trunk and head; by default that of a quantised model, else fp32, fp16 on CUDA. The "
            "native backend runs fp32, fp16, bf16 and on the CPU int8; onnxruntime fp32, on the CPU int8 and on CUDA "
            "fp16; tensorrt all of them.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="What the plan runs on.")] = Device.cpu,
    target: Annotated[
        str | None,
        typer.Option(help="Build for a GPU that is not here, such as sm_90; it is tuned when first loaded there."),
    ] = None,
    tactics: Annotated[
        Tactics, typer.Option(help="On CUDA, how many implementations of each layer are measured.")
    ] = Tactics.quick,
    tune_for: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BxHxW",
            help="On CUDA, a batch and padded size to measure at, such as 1x800x1216; may be repeated.",
        ),
    ] = None,
    tuning_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="On CUDA, begin to measure no further layer after this time.")
    ] = None,
    provider: Annotated[
        Provider | None,
        typer.Option(help="With onnxruntime on CUDA, what runs it there; cuda by default.", show_default=False),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="With tensorrt, the most images at once, 8 by default.", show_default=False),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(min=0, max=5, help="With tensorrt, 0 builds fastest, 5 searches longest.", show_default=False),
    ] = None,
    hardware: Annotated[
        Hardware, typer.Option(help="With tensorrt, the other GPUs that the engines are to run on too.")
    ] = Hardware.none,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="With tensorrt, for other versions of it too.")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Below fp32, compare with it on four images of this folder; else on a scene."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even if the plan is up to date.")] = False,
) -> None:
    """Cut a model into trunk and box head, optimise both for this machine and write the plan.

    A plan that is up to date is left as it is. An interrupted build leaves the old plan or none.
    """
    from fpn_engine.discovery import find_plan, remember_plan
    from fpn_engine.plan import read_plan

    start = time.perf_counter()
    cuda: ForCuda | None
    by_provider = backend is Backend.onnxruntime and device is Device.cuda
    if provider and not by_provider:
        raise typer.BadParameter("goes with --backend onnxruntime --device cuda", param_hint="--provider")
    if (backend is Backend.tensorrt or by_provider) and (
        target is not None or tactics is not Tactics.quick or tuning_seconds is not None
    ):
        message = "are of the native backend; the others compile on the GPU that is to run the plan"
        raise typer.BadParameter(message, param_hint="--target, --tactics, --tuning-seconds")
    if backend is not Backend.tensorrt and (
        (max_batch and provider is not Provider.tensorrt)
        or optimization_level is not None
        or version_compatible
        or hardware is not Hardware.none
    ):
        raise typer.BadParameter(
            "goes with --backend tensorrt",
            param_hint="--max-batch, --optimization-level, --hardware, --version-compatible",
        )
    if backend is Backend.tensorrt:
        cuda = _engine_options(tune_for, max_batch, optimization_level, hardware, version_compatible)
    elif by_provider:
        cuda = _provider_options(provider or Provider.cuda, tune_for, max_batch)
    else:
        cuda = _tuning(device, target, tactics, tune_for, tuning_seconds)
    if onnx is not None and model is None:
        path, what = _build_file(onnx, output or onnx.with_suffix(".plan"), backend, precision, cuda, force)
    elif model is not None and onnx is None:
        path, what = _build_named(model, output, backend, precision, cuda, force)
    else:
        raise typer.BadParameter("give an ONNX file or --model NAME, one of the two", param_hint="MODEL")
    remember_plan(path)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    if what:
        note(f"{path}: {what}, {size}, built in {time.perf_counter() - start:.1f} s")
        if read_plan(path).manifest.precision != Precision.fp32:
            _compare(onnx or checkpoint_of_model(str(model)), path, images)
    else:
        note(f"{path} is up to date ({size})")
    found = find_plan(None)
    is_found = found and os.path.realpath(found.path) == os.path.realpath(path)
    suggest("infer", "image.jpg", *(() if is_found else ("--plan", path)))


def _compare(model: Path, plan: Path, images: Path | None) -> None:
    """Say how far a plan of lower precision is from its model."""
    from fpn_export.verification.summary import summarize_build

    with steps("comparing with fp32"):
        line = summarize_build(model, plan, images)
    note(line)


def _tuning(
    device: Device, target: str | None, tactics: Tactics, shapes: list[str] | None, seconds: float | None
) -> ForCuda | None:
    """What to tune a native plan for CUDA for, None for the CPU."""
    if device is Device.cpu and target is None:
        if shapes or seconds is not None or tactics is not Tactics.quick:
            raise typer.BadParameter("goes with --device cuda", param_hint="--tactics, --tune-for, --tuning-seconds")
        return None
    from fpn_export.native.tactics import TuneFor

    return TuneFor(
        target=target or "",
        level=tactics,
        shapes=tuple(_read_shape(shape) for shape in shapes or ()),
        seconds=seconds,
    )


def _engine_options(
    shapes: list[str] | None,
    max_batch: int | None,
    optimization_level: int | None,
    hardware: Hardware,
    version_compatible: bool,
) -> ForCuda:
    """How TensorRT is to build."""
    from fpn_export.tensorrt.builder import BuildOptions

    batches, sizes = _shapes_to_compile(shapes, max_batch)
    return BuildOptions(
        batches=batches,
        sizes=sizes,
        optimization_level=3 if optimization_level is None else optimization_level,
        hardware=hardware.value,
        version_compatible=version_compatible,
    )


def _provider_options(provider: Provider, shapes: list[str] | None, max_batch: int | None) -> ForCuda:
    """What ONNX Runtime is to run with."""
    from fpn_export.ort_cuda_parts import ProviderOptions

    if shapes and provider is Provider.cuda:
        raise typer.BadParameter("goes with --provider tensorrt; cuda takes any shape", param_hint="--tune-for")
    batches, sizes = _shapes_to_compile(shapes, max_batch)
    return ProviderOptions(provider=provider.value, batches=batches, sizes=sizes)


def _shapes_to_compile(shapes: list[str] | None, max_batch: int | None) -> tuple[Any, tuple[tuple[int, int], ...]]:
    """``Batches`` and sizes; the largest batch of ``shapes`` is the one to be fastest at."""
    from fpn_export.tensorrt.profiles import MOST_IMAGES, Batches

    read = [_read_shape(shape) for shape in shapes or ()]
    best = max([batch for batch, *_ in read], default=1)
    batches = Batches(best=best, most=max_batch or max(best, MOST_IMAGES))
    return batches, tuple(dict.fromkeys((height, width) for _, height, width in read))


def _read_shape(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,5})", text, re.ASCII)
    if match is None:
        raise typer.BadParameter(f"{text} is no batch x height x width", param_hint="--tune-for")
    return int(match[1]), int(match[2]), int(match[3])


def _build_file(
    onnx: Path, plan: Path, backend: str, precision: str | None, cuda: ForCuda | None, force: bool
) -> tuple[Path, str]:
    """The plan, and what it is if it was built."""
    from fpn_export.build import build_plan

    refuse_folder(onnx)
    with steps(f"building {onnx.name}") as step:
        built = build_plan(
            onnx,
            plan,
            backend=backend,
            precision=precision,
            tune_for=cuda,
            force=force,
            on_progress=step,
            on_note=note,
        )
    return built.path, "" if built.cached else built.manifest.runtime


def _build_named(
    name: str, output: Path | None, backend: str, precision: str | None, cuda: ForCuda | None, force: bool
) -> tuple[Path, str]:
    """A copy of the cached plan."""
    from fpn_engine.files import replacing
    from fpn_engine.named import find_model
    from fpn_engine.plan import read_plan

    plan = output or Path(f"{find_model(name).name}.plan")
    cached = plan_of_model(name, backend=backend, precision=precision, tune_for=cuda, force=force)
    with replacing(plan) as temporary:
        shutil.copyfile(cached, temporary)
    return plan, read_plan(plan).manifest.runtime
