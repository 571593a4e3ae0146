"""``fpn-engine verify``: two forms of a model side by side, and the first stage where they part."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fpn_engine.cli.console import counting, emit, fail, note, show
from fpn_engine.cli.options import (
    ClassesOption,
    DeviceOption,
    MaxSizeOption,
    MinSizeOption,
    NmsOption,
    ScoreOption,
    SetOption,
    SpecOption,
    ThreadsOption,
    gather_overrides,
)
from fpn_engine.cli.proposals import ProposalsOption, open_proposals
from fpn_engine.errors import FpnEngineError

if TYPE_CHECKING:
    from fpn_engine.annotations import CocoGroundTruth
    from fpn_engine.spec import ModelSpec

DISAGREE, SOME_FAILED, ALL_FAILED = 5, 3, 4
SHOWN_DIFFERENCES = 5


def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, an ONNX file or a plan.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another form of the same model.", show_default=False)],
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder of images to run both on.", show_default=False)],
    annotations: Annotated[
        Path | None, typer.Option(help="COCO JSON or VOC of these images: compare the AP of both too.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    proposals: ProposalsOption = None,
    cut: Annotated[
        bool,
        typer.Option("--cut", help="Run ONNX files as a plan is run: trunk and head cut out, our kernels around them."),
    ] = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a page, the JSON and a picture of the image that differs most."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON on stdout.")] = False,
    spec: SpecOption = None,
    classes: ClassesOption = None,
    min_size: MinSizeOption = None,
    max_size: MaxSizeOption = None,
    score: ScoreOption = None,
    nms: NmsOption = None,
    set_: SetOption = None,
) -> None:
    """Say whether two forms of a model find the same, and if not, which stage departs first.

    Any two of checkpoint, ONNX file and plan. Both run on the same images; each stage of B is also run on what A's was
    given, so that the first to depart is the one at fault. The twin of a detection has its class, IoU 0.95 and a score
    within 0.02. Exit code 0: they agree within what their precision explains; 5: they do not.
    """
    from fpn_engine.annotations import load_annotations
    from fpn_export.file_kind import FileKind, find_kind
    from fpn_export.verification import OpenOptions, compare, open_subject
    from fpn_export.verification.report import make_tables, to_dict

    truth = load_annotations(annotations) if annotations else None
    files = _choose(images, truth, limit)
    overrides = gather_overrides(classes, min_size, max_size, score, nms, set_)
    if (overrides or spec) and not any(find_kind(path) is FileKind.CHECKPOINT for path in (a, b)):
        raise typer.BadParameter("is of a checkpoint, which neither is", param_hint="--spec, --classes, ... --set")
    options = OpenOptions(
        spec_overrides=overrides,
        spec_path=spec,
        cut=cut,
        device=device,
        threads=threads,
    )
    first, second = (open_subject(path, options) for path in (a, b))
    if truth:
        for subject in (first, second):
            truth.check_categories(subject.spec.categories)
    given = open_proposals(first.spec, proposals, truth.image_ids if truth else None)
    _note_differences(first.spec, second.spec)
    with counting("comparing", len(files)) as advance:
        comparison = compare(
            first,
            second,
            _read(files),
            proposals=given,
            truth=truth,
            image_ids=[file.image_id for file in files],
            on_image=advance,
        )
    for _, error in comparison.failures:
        note(f"fpn-engine: {error}")
    if not comparison.images:
        fail("no image could be compared", ALL_FAILED)
    if save:
        _save(comparison, files, save)
    if json:
        emit(json_module.dumps(to_dict(comparison), indent=1))
    else:
        show(*make_tables(comparison))
    if not comparison.agrees:
        raise typer.Exit(DISAGREE)
    if comparison.failures:
        raise typer.Exit(SOME_FAILED)


class _File(NamedTuple):
    """An image, its name within the folder, and its id in the annotations, 0 without them."""

    path: Path
    name: str
    image_id: int


def _choose(folder: Path, truth: CocoGroundTruth | None, limit: int | None) -> list[_File]:
    """The annotated images, or all in the folder without annotations."""
    from fpn_engine.cli.eval import find_files
    from fpn_engine.sources import list_images

    if not os.path.isdir(folder):
        raise FpnEngineError(f"there is no folder {folder}; --images names the folder of the images to compare on")
    if truth:
        found = [(path, image_id) for image_id, path in find_files(truth, folder).items()]
    else:
        found = [(path, 0) for path in list_images([folder])]
    return [_File(path, os.path.relpath(path, folder), image_id) for path, image_id in found[:limit]]


def _read(files: Sequence[_File]) -> Iterator[tuple[str, Any]]:
    """Name and pixels of each, or the error instead of them."""
    from fpn_engine.images import to_array

    for file in files:
        try:
            yield file.name, to_array(file.path)
        except FpnEngineError as error:
            yield file.name, error


def _note_differences(a: ModelSpec, b: ModelSpec) -> None:
    from fpn_export.verification.comparison import describe_differences

    if not (found := describe_differences(a, b)):
        return
    more = f" and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
    note(f"the specifications differ, A against B: {', '.join(found[:SHOWN_DIFFERENCES])}{more}")


def _save(comparison: Any, files: Sequence[_File], folder: Path) -> None:
    from fpn_engine.images import to_array
    from fpn_export.verification.page import save_page

    worst = comparison.worst_image.name
    path = next(file.path for file in files if file.name == worst)
    for written in save_page(comparison, to_array(path), folder):
        note(f"wrote {written}")
