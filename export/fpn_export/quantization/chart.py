"""The chart of a report as SVG: for each layer what it costs alone, and what has gathered there."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from fpn_export.quantization.report import LayerRow, Report

WIDTH, NAMES, RIGHT, TOP, ROW, BOTTOM = 860, 300, 60, 64, 18, 26
BARS, DOTS, EARLIER, KEPT = "#1f77b4", "#d62728", "#f2b8b5", "#999"
TICKS = 5
KEY = 250  # width of an entry of the legend


def draw(report: Report) -> str:
    """An SVG document, layers from top to bottom in the order in which they run."""
    rows = report.layers
    highest = max((value for row in rows for value in _errors(row)), default=0.0) or 1.0
    scale = (WIDTH - NAMES - RIGHT) / highest
    height = TOP + ROW * len(rows) + BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="11">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *_heading(report),
            *_axis(height, highest),
            *(line for index, row in enumerate(rows) for line in _row(row, TOP + ROW * index, scale)),
            "</svg>\n",
        ]
    )


def _errors(row: LayerRow) -> list[float]:
    return [value for value in (row.alone, row.gathered_all, row.gathered) if value is not None]


def _heading(report: Report) -> Iterator[str]:
    yield f'<text x="10" y="20" font-size="14">{escape(report.summary())}</text>'
    keys = [(BARS, "alone: error of the outputs"), (DOTS, "gathered at the layer, as written")]
    if any(row.why_float == "costs too much" for row in report.layers):
        keys.append((EARLIER, "gathered, all layers quantised"))
    for index, (color, text) in enumerate(keys):
        x = 16 + KEY * index
        yield f'<circle cx="{x}" cy="38" r="4" fill="{color}"/><text x="{x + 9}" y="42">{text}</text>'


def _axis(height: int, highest: float) -> Iterator[str]:
    for tick in range(TICKS):
        x = NAMES + (WIDTH - NAMES - RIGHT) * tick / (TICKS - 1)
        label = f"{100 * highest * tick / (TICKS - 1):.1f} %"
        yield f'<path d="M{x:.1f} {TOP - 6}V{height - BOTTOM}" stroke="#ddd"/>'
        yield f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{label}</text>'


def _row(row: LayerRow, y: int, scale: float) -> Iterator[str]:
    name = row.name if row.quantized else f"{row.name} (float)"
    color = "black" if row.quantized else KEPT
    yield f'<text x="{NAMES - 8}" y="{y + 10}" text-anchor="end" fill="{color}">{escape(name)}</text>'
    if row.alone is not None:
        fill = BARS if row.quantized else KEPT
        yield f'<rect x="{NAMES}" y="{y + 2}" width="{row.alone * scale:.1f}" height="9" fill="{fill}"/>'
    if row.gathered_all is not None:
        yield f'<circle cx="{NAMES + row.gathered_all * scale:.1f}" cy="{y + 6}" r="3" fill="{EARLIER}"/>'
    if row.gathered is not None:
        yield f'<circle cx="{NAMES + row.gathered * scale:.1f}" cy="{y + 6}" r="3" fill="{DOTS}"/>'
