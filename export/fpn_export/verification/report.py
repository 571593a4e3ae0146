"""A comparison as tables for people and as JSON."""

from __future__ import annotations

import math
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fpn_export.verification.comparison import Comparison, ImageResult, StageRecord
from fpn_export.verification.matching import Lost
from fpn_export.verification.tensor_error import TensorError
from fpn_export.verification.verdict import say_ap, say_error, say_tolerance, say_verdict

SHOWN_LOST = 10


def make_tables(comparison: Comparison) -> list[RenderableType]:
    """What is compared, the stages, the detections without a twin, and the verdict."""
    head = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        head.add_row(letter, Text(f"{side.name}: {side.runtime}"))
    head.add_row("images", str(len(comparison.images)) + _say_failures(comparison))
    head.add_row("detections", Text(_count(comparison)))
    if text := say_ap(comparison):
        head.add_row("AP", text.removeprefix("AP "))
    shown: list[RenderableType] = [head, "", _stage_table(comparison)]
    if lost := list_lost(comparison):
        shown += ["", _lost_table(lost)]
    verdict = "agree" if comparison.agrees else "disagree"
    return [*shown, "", Text(f"{verdict}: {say_verdict(comparison)}", style="bold")]


def list_lost(comparison: Comparison) -> list[tuple[ImageResult, Lost]]:
    """Detections without a twin: those that are no ties first, the surest first."""
    every = [(image, lost) for image in comparison.images for lost in image.lost]
    return sorted(every, key=lambda pair: (pair[1].tie, -pair[1].score))


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything, JSON-ready."""
    departure = comparison.departure
    scores = comparison.scores
    return {
        "agree": comparison.agrees,
        "verdict": say_verdict(comparison),
        "a": comparison.a._asdict(),
        "b": comparison.b._asdict(),
        "specifications differ": comparison.differences,
        "images": len(comparison.images),
        "failed": [{"image": name, "error": error} for name, error in comparison.failures],
        "first stage that departs": None if departure is None else _describe(departure),
        "stages": [_describe(record) for record in comparison.stages.values()],
        "parts": [_describe(record) for record in comparison.parts.values() if record.fed_part],
        "detections": {
            "a": comparison.found[0],
            "b": comparison.found[1],
            "twins": comparison.twins,
            "without twin": len(comparison.lost),
            "ties": comparison.ties,
            "allowed share of sure ones": comparison.tolerances.lost_detections,
            "unmatched": [{"image": image.name, **lost._asdict()} for image, lost in list_lost(comparison)],
        },
        "AP": None
        if scores is None
        else {
            "a": scores[0].to_dict(),
            "b": scores[1].to_dict(),
            "difference": _finite(comparison.ap_difference),
            "allowed": comparison.tolerances.ap,
        },
    }


def _describe(record: StageRecord) -> dict[str, Any]:
    return {
        "stage": record.stage,
        "level": record.fed_part or None,
        "as they came": _error(record.came),
        "on the same input": _error(record.fed),
        "tolerance": record.tolerance,
        "departs": record.departs,
        "worst image": record.fed_image,
    }


def _error(error: TensorError) -> dict[str, Any] | str:
    return error.fault or {"norm": error.norm, "largest": error.largest}


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _stage_table(comparison: Comparison) -> Table:
    table = Table("stage", "as they came", "same input", "tolerance", "worst at", box=None, padding=(0, 2, 0, 0))
    for record in comparison.stages.values():
        exact = record.fed.value == 0
        place = "" if exact else " ".join(part for part in (record.fed_image, record.fed_part) if part)
        row = (
            record.stage,
            say_error(record.stage, record.came),
            say_error(record.stage, record.fed),
            say_tolerance(record),
            place,
        )
        table.add_row(*map(Text, row), style="bold" if record.departs else None)
    return table


def _lost_table(lost: list[tuple[ImageResult, Lost]]) -> Table:
    title = f"without a twin{'' if len(lost) <= SHOWN_LOST else f', the first {SHOWN_LOST} of {len(lost)}'}"
    table = Table(title, "only in", "class", "score", "cause", box=None, padding=(0, 2, 0, 0))
    for image, each in lost[:SHOWN_LOST]:
        table.add_row(*map(Text, (image.name, each.side, each.name, f"{each.score:.3f}", each.cause)))
    return table


def _count(comparison: Comparison) -> str:
    first, second = comparison.found
    return f"{first} and {second}, {comparison.twins} twins, {len(comparison.lost)} without, {comparison.ties} ties"


def _say_failures(comparison: Comparison) -> str:
    return f", {len(comparison.failures)} left out that cannot be read" if comparison.failures else ""
