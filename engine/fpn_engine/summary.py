"""Detections as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from fpn_engine.detections import Detections

MAX_CLASS_COLUMNS = 6  # rarer classes share the column "other"


def summary_table(images: Sequence[Detections]) -> RenderableType:
    """A table for people: one image's detections, or the number per class of each of several images."""
    return _detections_table(images[0]) if len(images) == 1 else _counts_table(images)


def _detections_table(detections: Detections) -> RenderableType:
    table = Table(Column("class", overflow="fold"))
    for column in ("score", "x1", "y1", "x2", "y2"):
        table.add_column(column, justify="right", overflow="fold")
    for detection in detections:
        corners = [f"{corner:.1f}" for corner in detection.box]
        table.add_row(_plain(detection.category.name), f"{detection.score:.2f}", *corners)
    if len(detections) == 0:
        table.add_row("nothing found")
    if detections.source is None:
        return table
    title = _plain(detections.source)
    title.no_wrap, title.overflow = True, "ignore"  # a name in one piece, to be copied
    return Group(title, table)


def _counts_table(images: Sequence[Detections]) -> Table:
    counts = [Counter(detections.names) for detections in images]
    total = sum(counts, Counter[str]())
    names = [name for name, _ in total.most_common(MAX_CLASS_COLUMNS)]
    titles = [*names, "other", "all"] if len(total) > len(names) else [*names, "all"]

    def cells(count: Counter[str]) -> list[str]:
        shown = [count[name] for name in names]
        rest = [count.total() - sum(shown)] if len(total) > len(names) else []
        return [str(number or "") for number in shown + rest] + [str(count.total())]

    table = Table(Column("image", f"{len(images)} images", overflow="fold"), show_footer=True)
    for title, footer in zip(titles, cells(total), strict=True):
        table.add_column(_plain(title), footer, justify="right")
    for detections, count in zip(images, counts, strict=True):
        table.add_row(_plain(detections.source), *cells(count))
    return table


def _plain(text: str | None) -> Text:
    """Names as they are: brackets are no markup, line breaks and other controls are visible."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text or ""))
