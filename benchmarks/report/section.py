"""What a report is made of: sections of text, charts and tables, and how rows are found for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.charts import Bar
from benchmarks.rows import Row
from benchmarks.suite import OURS

USUAL = "R50-FPN, 800x1216, batch 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """``name``: of a picture file, empty where it is none."""

    title: str
    svg: str
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Numbers are text already; ``title`` may be empty."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    title: str
    text: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


def rows_of(rows: Iterable[Row], suite: str) -> list[Row]:
    return [row for row in rows if row.get("suite") == suite]


def measured(row: Row) -> dict[str, Any]:
    """Contestants that were timed, the fastest first."""
    timed = {name: about for name, about in row.get("contestants", {}).items() if "milliseconds" in about}
    return dict(sorted(timed.items(), key=lambda item: item[1]["milliseconds"]["median"]))


def bar_of(name: str, about: dict[str, Any], note: str = "") -> Bar:
    spent = about["milliseconds"]
    ours = name.startswith(OURS)
    return Bar(label=name, value=spent["median"], low=spent["p20"], high=spent["p80"], note=note, ours=ours)
