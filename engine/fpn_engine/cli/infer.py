"""``fpn-engine infer``: detect in files, folders and globs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpn_engine.cli.console import counting, note
from fpn_engine.cli.report import Format, Report, open_report
from fpn_engine.errors import FpnEngineError

if TYPE_CHECKING:
    from fpn_engine.detections import Detections
    from fpn_engine.engine import Engine

SOME_FAILED, ALL_FAILED = 3, 4
SHOWN_SCORE = 0.5  # lowest score in tables and pictures unless --score says otherwise


def infer(
    images: Annotated[list[str], typer.Argument(help="Image files, folders and globs.", show_default=False)],
    plan: Annotated[
        Path | None,
        typer.Option(help="Default: $FPN_ENGINE_PLAN, the only *.plan in this folder, or the last one built."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write pictures with boxes into this folder.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    format: Annotated[
        Format, typer.Option(help="jsonl is one object per line, coco the COCO results array.")
    ] = Format.table,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write results here, not to stdout.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO file with the image ids for --format coco.")] = None,
    score: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Lowest score; default the model's own, 0.5 in tables and pictures."),
    ] = None,
    nms: Annotated[
        float | None, typer.Option(min=0, max=1, help="IoU above which a box yields to a better one.")
    ] = None,
    max_detections: Annotated[int | None, typer.Option(min=1, help="Most detections per image.")] = None,
    classes: Annotated[str | None, typer.Option(help="Only these, by name or id: cat,dog.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Look into folders of folders.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a JSON Lines --output, skipping the done.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Most images run at once.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default one per core.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest image to accept, in pixels.")] = None,
) -> None:
    """Detect objects in images of any size and common format.

    Results go to stdout as a table, JSON, JSON Lines or COCO results; everything else goes to stderr. A file
    that cannot be read is reported and the others still finish (exit code 3, or 4 if all failed).
    """
    chosen = Format.json if json else format
    if resume and (chosen is not Format.jsonl or output is None):
        raise FpnEngineError("--resume needs --format jsonl and --output FILE")
    if output is not None and chosen is Format.table:
        raise FpnEngineError("--output needs --format json, jsonl or coco")

    from fpn_engine.discovery import find_plan
    from fpn_engine.engine import Engine
    from fpn_engine.sources import list_images

    found = find_plan(plan)
    if found.reason:
        note(f"using {found.path} ({found.reason})")
    paths: Any = list_images(images, recursive=recursive)
    if resume and output is not None:
        paths = _unfinished(paths, output)
    paths = list(paths)
    engine = Engine.load(found.path, batch_size=batch, threads=threads)
    run = _Run(engine, _Selection(engine, classes, score), save)
    with open_report(chosen, output, annotations, resume) as report, counting("detecting", len(paths)) as advance:
        thresholds = engine.thresholds(score, nms, max_detections)
        for outcome in engine.stream(paths, thresholds=thresholds, read=_reader(max_pixels)):
            run.take(outcome, report)
            advance()
    if run.failed:
        note(f"{run.failed} of {len(paths)} images failed")
        raise typer.Exit(ALL_FAILED if run.failed == len(paths) else SOME_FAILED)


class _Selection:
    """The class filter, and the lowest score for people."""

    def __init__(self, engine: Engine, classes: str | None, score: float | None) -> None:
        self._shown_score = SHOWN_SCORE if score is None else score
        self._classes: list[str | int] | None = None
        if classes is not None:
            categories = engine.spec.categories
            known: dict[str, int] = {str(c.id): c.id for c in categories} | {c.name: c.id for c in categories}
            wanted = [name.strip() for name in classes.split(",")]
            for name in wanted:
                if name not in known:
                    raise FpnEngineError(
                        f"unknown class {name!r}; this model knows {', '.join(c.name for c in categories)}"
                    )
            self._classes = [known[name] for name in wanted]

    def reported(self, detections: Detections) -> Detections:
        return detections.filter(classes=self._classes) if self._classes else detections

    def shown(self, detections: Detections) -> Detections:
        return detections.filter(min_score=self._shown_score)


class _Run:
    """Takes outcomes one by one: report, picture, count of failures."""

    def __init__(self, engine: Engine, selection: _Selection, save: Path | None) -> None:
        self.failed = 0
        self._selection = selection
        self._save = save
        self._names: set[str] = set()

    def take(self, outcome: Any, report: Report) -> None:
        if isinstance(outcome.result, FpnEngineError):
            self._fail(outcome.source, outcome.result, report)
            return
        detections = self._selection.reported(outcome.result)
        if self._save is not None:
            try:
                self._picture(outcome, detections, self._save)
            except FpnEngineError as error:
                self._fail(outcome.source, error, report)
                return
        report.write(detections, self._selection.shown(detections))

    def _fail(self, source: str, error: FpnEngineError, report: Report) -> None:
        self.failed += 1
        note(f"fpn-engine: {' '.join(str(error).split())}")
        report.write_error(source, str(error))

    def _picture(self, outcome: Any, detections: Detections, folder: Path) -> None:
        from fpn_engine.drawing import draw_detections, save_picture

        stem, suffix = Path(outcome.source).stem, Path(outcome.source).suffix.lower()
        suffix = suffix if suffix in (".jpg", ".jpeg", ".png") else ".png"
        name, number = stem + suffix, 1
        while name in self._names:  # the same name from another folder
            number += 1
            name = f"{stem}-{number}{suffix}"
        self._names.add(name)
        save_picture(draw_detections(outcome.pixels, self._selection.shown(detections)), folder / name)


def _unfinished(paths: Iterator[Path], output: Path) -> Iterator[Path]:
    from fpn_engine.results import completed_images, cut_partial_line

    done: set[str] = set()
    if output.exists():
        done = completed_images(output)
        cut_partial_line(output)
    return (path for path in paths if str(path) not in done)


def _reader(max_pixels: int | None) -> Any:
    from fpn_engine.images import MAX_PIXELS, read_image

    return functools.partial(read_image, max_pixels=max_pixels or MAX_PIXELS)
