"""``fpn-engine quantize``: a float ONNX file to one of 8 bits, and a report of what that costs."""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpn_engine.cli.console import note, refuse_folder, steps, suggest
from fpn_engine.errors import FpnEngineError
from fpn_engine.files import refuse_replacing

if TYPE_CHECKING:
    from fpn_engine.annotations import CocoGroundTruth
    from fpn_engine.spec import ModelSpec


class EightBits(enum.StrEnum):
    """Number type of quantised layers."""

    int8 = "int8"
    fp8 = "fp8"


class Ranges(enum.StrEnum):
    """How the range of an activation is found."""

    max = "max"
    percentile = "percentile"
    mse = "mse"
    entropy = "entropy"


def quantize(
    onnx: Annotated[
        Path, typer.Argument(metavar="MODEL", help="An ONNX file that fpn-engine export wrote.", show_default=False)
    ],
    images: Annotated[Path, typer.Option(help="Folder of photographs like those to come, not those to be tested on.")],
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="COCO JSON or VOC of images in it: only these are taken, and AP is measured.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: beside it, as .int8.onnx or .fp8.onnx.")
    ] = None,
    precision: Annotated[
        EightBits, typer.Option(help="int8 runs on TensorRT and on CPUs, fp8 (E4M3) on TensorRT.")
    ] = EightBits.int8,
    ranges: Annotated[Ranges, typer.Option(help="How the range of an activation is found.")] = Ranges.percentile,
    calibrate: Annotated[int, typer.Option(min=1, help="Images that ranges are found on.")] = 64,
    score: Annotated[
        int, typer.Option(min=1, help="Most images to score before and after; others if there are.")
    ] = 100,
    sensitivity: Annotated[
        int, typer.Option(min=0, help="Images that each layer is measured on; 0 leaves it out, and the fallback too.")
    ] = 4,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Points that may be lost, of AP, or without annotations of agreement; the layers that cost most stay "
            "in float until it holds. Default: 0.3 of AP, any agreement.",
            show_default=False,
        ),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A layer to leave in float, or several by a *; may be repeated."),
    ] = None,
) -> None:
    """Quantise the layers of a model to 8 bits, calibrated on real images, and report what each layer costs.

    The ranges come from the images as the model sees them, resized and normalised. The report is written beside the
    model: Markdown, JSON and a chart.
    """
    target = output or onnx.with_suffix(f".{precision}.onnx")
    refuse_folder(onnx)
    if target.suffix.lower() != ".onnx":
        raise FpnEngineError(f"the quantised model is an ONNX file; give a name that ends in .onnx, not {target}")
    refuse_replacing(target, "--output", [onnx])
    data, page, chart = (target.with_suffix(suffix) for suffix in (".json", ".md", ".svg"))
    for path in (data, page, chart):
        if os.path.exists(path) and not _is_report(data):
            raise FpnEngineError(f"the report would replace {path}, which is another file's; give another name with -o")

    from onnx import save

    from fpn_engine.files import replacing
    from fpn_export.onnx_file import read_onnx
    from fpn_export.quantization.chart import draw
    from fpn_export.quantization.quantize import QuantizeOptions, quantize_model

    if tolerance is None and annotations is not None:
        tolerance = 0.3
    options = QuantizeOptions(
        precision=precision.value,
        ranges=ranges.value,
        calibrate=calibrate,
        score=score,
        sensitivity=sensitivity,
        tolerance=tolerance,
        keep_float=tuple(keep_float or ()),
    )
    model, spec = read_onnx(onnx)
    paths, truth = _find_images(spec, images, annotations)
    with replacing(target) as temporary, steps(f"quantising {onnx.name}") as step:
        made, report = quantize_model(model, spec, paths, options, truth=truth, begin=_counting(step), on_note=note)
        step("write")
        save(made, str(temporary))
    pages = {data: report.to_json(), page: report.to_markdown(target.name, chart.name), chart: draw(report)}
    for path, text in pages.items():
        with replacing(path) as temporary:
            temporary.write_text(text)
    note(f"{target}: {report.summary()}, {target.stat().st_size / 1e6:.1f} MB of {onnx.stat().st_size / 1e6:.1f}")
    for row in report.float_layers:
        note(f"in float32: {row.name}, {row.why_float}")
    note(f"report: {page}")
    for_tensorrt = () if precision is EightBits.int8 else ("--backend", "tensorrt", "--precision", "fp8")
    suggest("build", target, *for_tensorrt)


def _is_report(path: Path) -> bool:
    """Whether an earlier run wrote it."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"calibrated_on", "layers"} <= values.keys()


def _find_images(spec: ModelSpec, folder: Path, annotations: Path | None) -> tuple[list[Path], CocoGroundTruth | None]:
    """The images to take: all of the folder, or those that are annotated."""
    if not os.path.isdir(folder):
        raise FpnEngineError(f"there is no folder {folder}; --images names the folder of the photographs")
    if annotations is None:
        from fpn_engine.sources import list_images

        return list(list_images([folder])), None
    from fpn_engine.annotations import load_annotations

    truth = load_annotations(annotations)
    truth.check_categories(spec.categories)
    paths = [folder / image.file_name for image in truth.images]
    there = [path for path in paths if os.path.isfile(path)]
    if not there:
        raise FpnEngineError(f"none of the {len(paths)} annotated images is in {folder}; check --images")
    if len(there) < len(paths):
        note(f"{len(paths) - len(there)} of {len(paths)} annotated images are not in {folder} and are left out")
    return there, truth


def _counting(step: Callable[[str], None]) -> Callable[[str, int], Callable[[], None]]:
    """Steps that count what is done."""

    def begin(title: str, total: int) -> Callable[[], None]:
        done = 0
        step(f"{title}, {total}")

        def advance() -> None:
            nonlocal done
            done += 1
            step(f"{title}, {done} of {total}")

        return advance

    return begin
