"""``fpn-engine infer``: detect in files, folders and globs."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpn_engine.cli.console import counting, note
from fpn_engine.cli.options import (
    BatchOption,
    BucketOption,
    Decode,
    DecodeOption,
    DeviceOption,
    ModelOption,
    PlanOption,
    StreamsOption,
    ThreadsOption,
)
from fpn_engine.cli.plans import choose_plan
from fpn_engine.cli.proposals import ProposalsOption, open_proposals
from fpn_engine.cli.report import Format, Report, open_report
from fpn_engine.errors import AnnotationError, FpnEngineError
from fpn_engine.files import refuse_replacing, unwritable
from fpn_engine.spec import MAX_DETECTIONS

if TYPE_CHECKING:
    from fpn_engine.detections import Detections
    from fpn_engine.engine import Engine
    from fpn_engine.spec import Category
    from fpn_engine.tasks import AnyPixels

SOME_FAILED, ALL_FAILED = 3, 4
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
SHOWN_SCORE = 0.5  # lowest score in tables and pictures unless --score says otherwise


def infer(
    images: Annotated[list[str], typer.Argument(help="Image files, folders and globs.", show_default=False)],
    plan: PlanOption = None,
    model: ModelOption = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write pictures with boxes or masks into this folder.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    format: Annotated[
        Format, typer.Option(help="jsonl is one object per line, coco the COCO results array.")
    ] = Format.table,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write results here, not to stdout.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO file or VOC folder with the image ids for --format coco and --proposals.")
    ] = None,
    proposals: ProposalsOption = None,
    score: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Lowest score; default the model's own, 0.5 in tables and pictures."),
    ] = None,
    nms: Annotated[
        float | None, typer.Option(min=0, max=1, help="IoU above which a box yields to a better one.")
    ] = None,
    max_detections: Annotated[
        int | None, typer.Option(min=1, max=MAX_DETECTIONS, help="Most detections per image.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Only these, by name or id: cat,dog.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Look into folders of folders.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a JSON Lines --output, skipping the done.")
    ] = False,
    batch: BatchOption = 1,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    streams: StreamsOption = 1,
    bucket: BucketOption = None,
    decode: DecodeOption = Decode.cpu,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest image to accept, in pixels.")] = None,
) -> None:
    """Detect objects, or propose masks, in images of any size and common format.

    Results go to stdout as a table, JSON, JSON Lines or COCO results; everything else goes to stderr. A file
    that cannot be read is reported and the others still finish (exit code 3, or 4 if all failed).

    Where no plan is named or found, a small model that comes along detects shapes in generated scenes.
    """
    if json and format not in (Format.table, Format.json):
        raise typer.BadParameter(f"does not go with --format {format}", param_hint="--json")
    chosen = Format.json if json else format
    if resume and (chosen is not Format.jsonl or output is None):
        raise typer.BadParameter("needs --format jsonl and --output FILE", param_hint="--resume")
    if output is not None and chosen is Format.table:
        raise typer.BadParameter("needs --format json, jsonl or coco", param_hint="--output")
    if annotations is not None and chosen is not Format.coco and proposals is None:
        raise typer.BadParameter("needs --format coco", param_hint="--annotations")

    from fpn_engine.annotations import load_annotations
    from fpn_engine.engine import Engine
    from fpn_engine.image_file import MAX_PIXELS
    from fpn_engine.named import BUNDLED
    from fpn_engine.sources import list_images

    paths = list(list_images(images, recursive=recursive))
    listed = len(paths)
    pictures = _name_pictures(paths, save) if save else {}
    if resume and output is not None:
        paths = _unfinished(paths, output)
        if not paths:
            return
    plan_path = choose_plan(plan, model, default=BUNDLED)
    refuse_replacing(output, "--output", [plan_path, annotations, proposals, *paths])
    engine = Engine.load(
        plan_path,
        batch_size=batch,
        threads=threads,
        device=device,
        streams=streams,
        buckets=bucket,
        images=len(paths),
        decode=decode.value,
    )
    read = functools.partial(engine.read, max_pixels=max_pixels or MAX_PIXELS)
    ids = load_annotations(annotations).image_ids if annotations else None
    given = open_proposals(engine.spec, proposals, ids)
    selection = _Selection(engine, classes, score, nms, max_detections)
    run = _Run(selection, pictures)
    with open_report(chosen, output, ids, resume) as report, counting("detecting", len(paths)) as advance:
        for outcome in engine.stream(paths, thresholds=selection.thresholds, proposals=given, read=read):
            run.take(outcome, report)
            advance()
    if run.failed:
        note(f"{run.failed} of {len(paths)} images failed")
        raise typer.Exit(ALL_FAILED if run.failed == listed else SOME_FAILED)


class _Selection:
    """Which detections are wanted: thresholds, classes, and the lowest score for people."""

    def __init__(
        self, engine: Engine, classes: str | None, score: float | None, nms: float | None, max_detections: int | None
    ) -> None:
        self.thresholds = engine.thresholds(score, nms, max_detections)
        self._shown_score = SHOWN_SCORE if score is None else score
        self._max_detections = self.thresholds.box_detections_per_img
        self._classes: list[str | int] | None = None
        if classes is not None:
            spec = engine.spec
            self._classes = [_find_class(name.strip(), spec.categories) for name in classes.split(",")]
            # The best of these classes, which need not be among the best of all.
            self.thresholds = engine.thresholds(score, nms, spec.most_candidates)

    def reported(self, detections: Detections) -> Detections:
        if self._classes is None:
            return detections
        return detections.filter(classes=self._classes).best(self._max_detections)

    def shown(self, detections: Detections) -> Detections:
        return detections.filter(min_score=self._shown_score)


class _Run:
    """Takes outcomes one by one: report, picture, count of failures."""

    def __init__(self, selection: _Selection, pictures: Mapping[str, Path]) -> None:
        self.failed = 0
        self._selection = selection
        self._pictures = pictures

    def take(self, outcome: Any, report: Report) -> None:
        if isinstance(outcome.result, FpnEngineError):
            self._fail(outcome.source, outcome.result, report)
            return
        detections = self._selection.reported(outcome.result)
        shown = self._selection.shown(detections)
        if outcome.source in self._pictures:
            try:
                _save_picture(outcome.pixels, shown, self._pictures[outcome.source])
            except FpnEngineError as error:
                self._fail(outcome.source, error, report)
                return
        try:
            report.write(detections, shown)
        except AnnotationError as error:  # this image has no COCO id, the others may
            self._fail(outcome.source, error, report)

    def _fail(self, source: str, error: FpnEngineError, report: Report) -> None:
        self.failed += 1
        note(f"fpn-engine: {' '.join(str(error).split())}")
        report.write_error(source, str(error))


def _find_class(name: str, categories: Sequence[Category]) -> int:
    for category in categories:
        if name in (category.name, str(category.id)):
            return category.id
    known = ", ".join(category.name for category in categories)
    raise FpnEngineError(f"unknown class {name!r}; this model knows {known}")


def _name_pictures(paths: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Where each image's picture goes, by the image's name; given before the run, so that --resume gives the same."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    for parent in {path.parent for path in paths}:
        if os.path.isdir(parent) and os.path.samefile(parent, folder):
            raise FpnEngineError(f"--save {folder} would replace the images themselves; name another folder")
    named: dict[str, Path] = {}
    taken: set[str] = set()
    for path in paths:
        suffix = path.suffix.lower() if path.suffix.lower() in PICTURE_SUFFIXES else ".png"
        name, number = path.stem + suffix, 1
        while name in taken:  # the same name from another folder
            number += 1
            name = f"{path.stem}-{number}{suffix}"
        taken.add(name)
        named[str(path)] = folder / name
    originals = {os.path.realpath(path) for path in paths}
    for picture in named.values():  # through a link
        if os.path.realpath(picture) in originals:
            raise FpnEngineError(f"--save would replace the image behind {picture}; name another folder")
    return named


def _save_picture(pixels: AnyPixels, detections: Detections, path: Path) -> None:
    import numpy as np

    from fpn_engine.drawing import draw_detections, save_picture

    on_host = pixels if isinstance(pixels, np.ndarray) else pixels.cpu().numpy()
    if detections.run_lengths is None:
        save_picture(draw_detections(on_host, detections), path)
        return
    from fpn_engine.masks.painting import paint_masks

    save_picture(paint_masks(on_host, detections), path)


def _unfinished(paths: list[Path], output: Path) -> list[Path]:
    from fpn_engine.results import completed_images, cut_partial_line

    done = completed_images(output)
    cut_partial_line(output)
    left = [path for path in paths if str(path) not in done]
    if len(left) < len(paths):
        note(f"{len(paths) - len(left)} of {len(paths)} images are done already in {output}")
    return left
