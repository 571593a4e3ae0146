"""Where results go: to a table for people, or through a writer for machines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fpn_engine.cli.console import show
from fpn_engine.files import replacing, unwritable

if TYPE_CHECKING:
    from fpn_engine.detections import Detections
    from fpn_engine.results import Writer

PAGE = 200  # images per table, so that memory stays bounded


class Format(StrEnum):
    """How results are written."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    coco = "coco"


class Report:
    """Results for machines through a writer, or tables for people."""

    def __init__(self, writer: Writer | None) -> None:
        self._writer = writer
        self._page: list[Detections] = []

    def write(self, detections: Detections, shown: Detections) -> None:
        if self._writer is not None:
            self._writer.write(detections)
            return
        self._page.append(shown)
        if len(self._page) == PAGE:
            self.print_page()

    def write_error(self, source: str, message: str) -> None:
        if self._writer is not None:
            self._writer.write_error(source, message)

    def print_page(self) -> None:
        if self._page:
            from fpn_engine.summary import summary_table

            page, self._page = self._page, []  # not printed twice if printing fails
            show(summary_table(page))


@contextlib.contextmanager
def open_report(
    format: Format, output: Path | None, image_ids: Mapping[str, int] | None, resume: bool
) -> Iterator[Report]:
    if format is Format.table:
        report = Report(None)
        try:
            yield report
        finally:
            report.print_page()
        return
    from fpn_engine.results import open_writer

    with _open_stream(format, output, resume) as stream:
        writer = open_writer(format.value, stream, image_ids=image_ids)
        try:
            yield Report(writer)
        finally:
            writer.close()


@contextlib.contextmanager
def _open_stream(format: Format, output: Path | None, resume: bool) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    if format is Format.jsonl:  # every line stands by itself, so what is done stays
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            stream = output.open("a" if resume else "w", encoding="utf-8")
        except OSError as error:
            raise unwritable(output, error) from None
        try:
            yield stream
        finally:
            with contextlib.suppress(OSError):  # every line is flushed: what fails here has been reported
                stream.close()
        return
    with replacing(output) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield stream
