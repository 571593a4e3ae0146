"""Charts as SVG, narrow enough for a phone: labels stand above bars and at the ends of lines, so nothing is looked up.

Colours are CSS variables of the page; :func:`standalone` gives a picture its own, light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH = 420
EDGE = 8
BAR, LINE = 15, 18  # heights of a bar and of a line of text
SIZE, GLYPH = 13, 6.9  # of text: font size, and the width of a character, roughly
VALUE_ROOM = 92  # right of the longest bar
COLUMN, NAME_ROOM = 78, 190  # in the key of a stacked chart
LIGHT = {
    "ink": "#1a1f26",
    "muted": "#5a6572",
    "grid": "#e2e6eb",
    "ours": "#0a63c2",
    "other": "#a9b3bf",
    "bad": "#b3261e",
    "s1": "#0a63c2",
    "s2": "#86bbf0",
    "s3": "#f0bd4a",
    "s4": "#e2802b",
    "s5": "#b8502a",
    "s6": "#7d2c3b",
    "paper": "#ffffff",
}
DARK = {
    "ink": "#e9ecef",
    "muted": "#9ba6b2",
    "grid": "#2e353d",
    "ours": "#58a9ff",
    "other": "#5f6b78",
    "bad": "#ff8a80",
    "s1": "#4b9cf5",
    "s2": "#a9d0fa",
    "s3": "#f3c969",
    "s4": "#ee9a4d",
    "s5": "#d2714a",
    "s6": "#b0566a",
    "paper": "#14181d",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
STYLE = f"""text {{ font: {SIZE}px {FONT}; fill: var(--ink); font-variant-numeric: tabular-nums; }}
.muted {{ fill: var(--muted); }} .strong {{ font-weight: 600; }} .small {{ font-size: 11.5px; }}
.grid {{ stroke: var(--grid); }} .whisker {{ stroke: var(--ink); stroke-width: 1.2; }}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """``low`` and ``high`` draw a whisker; ``note`` stands beside the label; ours are in colour."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    ours: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A bar of named parts, which have the same colour in all bars of a chart."""

    label: str
    parts: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line through points (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]
    ours: bool = False


def draw_bars(bars: Sequence[Bar], write: Callable[[float], str], title: str) -> str:
    """Horizontal bars from zero, each with its value."""
    most = max(max(bar.value, bar.high or 0.0) for bar in bars)
    scale, parts, y = (WIDTH - 2 * EDGE - VALUE_ROOM) / most, [], float(EDGE)
    for bar in bars:
        y += LINE
        note = f' <tspan class="muted">{_escape(bar.note)}</tspan>' if bar.note else ""
        weight = ' class="strong"' if bar.ours else ""
        parts.append(f'<text x="{EDGE}" y="{y - 5:.1f}"><tspan{weight}>{_escape(bar.label)}</tspan>{note}</text>')
        length = max(1.5, bar.value * scale)
        parts.append(_rect(EDGE, y, length, BAR, "ours" if bar.ours else "other"))
        end = length
        if bar.low is not None and bar.high is not None:
            low, high, middle = EDGE + bar.low * scale, EDGE + bar.high * scale, y + BAR / 2
            parts.append(f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}" />')
            end = max(length, bar.high * scale)
        parts.append(f'<text x="{EDGE + end + 6:.1f}" y="{y + BAR - 3:.1f}">{_escape(write(bar.value))}</text>')
        y += BAR + 7
    return _svg(parts, y + 2, title)


def draw_stacks(stacks: Sequence[Stack], write: Callable[[float], str], title: str) -> str:
    """Bars of parts; the key below gives each part's value in every bar."""
    names = list(dict.fromkeys(name for stack in stacks for name, _ in stack.parts))
    colours = {name: f"s{1 + number % 6}" for number, name in enumerate(names)}
    totals = [sum(value for _, value in stack.parts) for stack in stacks]
    scale, parts, y = (WIDTH - 2 * EDGE - VALUE_ROOM) / max(totals), [], float(EDGE)
    for stack, total in zip(stacks, totals, strict=True):
        y += LINE
        parts.append(f'<text x="{EDGE}" y="{y - 5:.1f}">{_escape(stack.label)}</text>')
        x = float(EDGE)
        for name, value in stack.parts:
            parts.append(_rect(x, y, max(0.0, value * scale - 0.6), BAR + 5, colours[name]))
            x += value * scale
        parts.append(f'<text class="strong" x="{x + 6:.1f}" y="{y + BAR:.1f}">{_escape(write(total))}</text>')
        y += BAR + 14
    y += 4
    step = min(COLUMN, (WIDTH - 2 * EDGE - NAME_ROOM) / max(1, len(stacks) - 1))
    columns = [WIDTH - EDGE - step * (len(stacks) - 1 - number) for number in range(len(stacks))]
    if len(stacks) > 1:
        for number in range(max(len(stack.label.split()) for stack in stacks)):
            y += LINE - 4
            for stack, x in zip(stacks, columns, strict=True):
                word = _escape("".join(stack.label.split()[number : number + 1]))
                parts.append(f'<text class="muted small" text-anchor="end" x="{x:.1f}" y="{y:.1f}">{word}</text>')
        y += 8
    for name in names:
        parts.append(_rect(EDGE, y, 11, 11, colours[name]))
        parts.append(f'<text x="{EDGE + 18}" y="{y + 10:.1f}">{_escape(name)}</text>')
        for stack, x in zip(stacks, columns, strict=True):
            value = dict(stack.parts).get(name)
            text = "–" if value is None else write(value)
            parts.append(f'<text class="muted" text-anchor="end" x="{x:.1f}" y="{y + 10:.1f}">{_escape(text)}</text>')
        y += LINE
    return _svg(parts, y + 2, title)


def draw_lines(
    series: Sequence[Series],
    title: str,
    *,
    x_title: str,
    y_title: str,
    write_y: Callable[[float], str],
    log_y: bool = False,
    fits: Sequence[tuple[float, float]] = (),
) -> str:
    """Lines over a logarithmic x, named at their last points; ``fits``: (scale, exponent) of y = scale * x^exponent."""
    xs = sorted({x for each in series for x, _ in each.points})
    ys = [y for each in series for _, y in each.points]
    room = min(170.0, 14 + GLYPH * max(len(each.label) for each in series)) if len(series) > 1 else 16.0
    left, right, top, bottom = 52.0, WIDTH - EDGE - room, 30.0, 196.0
    ticks = _log_ticks(min(ys), max(ys)) if log_y else _ticks(max(ys))
    low, high = (min(ticks[0], min(ys)), max(ticks[-1], max(ys))) if log_y else (0.0, ticks[-1])

    def across(x: float) -> float:
        span = math.log(xs[-1] / xs[0]) or 1.0
        return left + (right - left) * math.log(x / xs[0]) / span

    def up(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log_y else (y - low) / (high - low)
        return bottom - (bottom - top) * share

    parts = [f'<text class="muted small" x="{EDGE}" y="14">{_escape(y_title)}</text>']
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{left} {up(tick):.1f}H{right:.1f}" />')
        label = _escape(write_y(tick))
        parts.append(
            f'<text class="muted small" text-anchor="end" x="{left - 6}" y="{up(tick) + 4:.1f}">{label}</text>'
        )
    parts += [
        f'<text class="muted small" text-anchor="middle" x="{place:.1f}" y="{bottom + 17:.1f}">{label}</text>'
        for place, label in _apart([across(x) for x in xs], [_short(x) for x in xs])
    ]
    parts.append(
        f'<text class="muted small" text-anchor="end" x="{right:.1f}" y="{bottom + 33:.1f}">{_escape(x_title)}</text>'
    )
    for scale, exponent in fits:
        ends = [(across(x), up(min(high, max(low, scale * x**exponent)))) for x in (xs[0], xs[-1])]
        parts.append(
            f'<path d="M{ends[0][0]:.1f} {ends[0][1]:.1f}L{ends[1][0]:.1f} {ends[1][1]:.1f}" fill="none" '
            'stroke="var(--s4)" stroke-width="1.5" stroke-dasharray="5 4" />'
        )
    heights = _spread([up(each.points[-1][1]) for each in series], 15.0)
    for each, height in zip(series, heights, strict=True):
        colour = "ours" if each.ours else "other"
        path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in each.points)
        parts.append(f'<path d="M{path}" fill="none" stroke="var(--{colour})" stroke-width="{0 if fits else 2.2}" />')
        for x, y in each.points:
            parts.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.2" fill="var(--{colour})" />')
        if len(series) > 1:
            x = across(each.points[-1][0]) + 8
            weight = "strong small" if each.ours else "small"
            parts.append(f'<text class="{weight}" x="{x:.1f}" y="{height + 4:.1f}">{_escape(each.label)}</text>')
    return _svg(parts, bottom + 42, title)


def standalone(svg: str) -> str:
    """A picture that brings its colours, light and dark, and a background."""
    light, dark = (" ".join(f"--{name}: {value};" for name, value in colours.items()) for colours in (LIGHT, DARK))
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}\n{STYLE}</style>"
    head, _, body = svg.partition(">")
    return f'{head}>{style}<rect width="100%" height="100%" rx="8" fill="var(--paper)" />{body}\n'


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    label = html.escape(title)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="2" fill="var(--{colour})" />'


def _escape(text: str) -> str:
    return html.escape(text, quote=False)


def _ticks(most: float) -> list[float]:
    """From 0 by a round step to at least ``most``, four to six of them."""
    rough = most / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 2.5, 5, 10) if unit * power >= rough)
    return [step * number for number in range(math.ceil(most / step) + 1)]


def _log_ticks(least: float, most: float) -> list[float]:
    """Powers of ten, with 2 and 5 between where there would be fewer than three."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    powers = [10.0**power for power in range(first, last + 1)]
    if len(powers) <= 3:
        powers = sorted({unit * power for power in powers[:-1] for unit in (1, 2, 5)} | {powers[-1]})
        inside = [tick for tick in powers if least / 2.1 <= tick <= most * 2.1]
        return inside if len(inside) >= 2 else powers
    return powers


def _apart(places: Sequence[float], labels: Sequence[str]) -> list[tuple[float, str]]:
    """Those labels that do not run into the one before."""
    kept: list[tuple[float, str]] = []
    for place, label in zip(places, labels, strict=True):
        if not kept or place - kept[-1][0] > GLYPH * (len(label) + len(kept[-1][1])) / 2 + 4:
            kept.append((place, label))
    return kept


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels, moved down where they would overlap."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for above, below in pairwise(order):
        placed[below] = max(placed[below], placed[above] + gap)
    return placed


def _short(x: float) -> str:
    if x >= 1e6:
        return f"{x / 1e6:.3g} M"
    return f"{x / 1e3:.3g} k" if x >= 1e4 else f"{x:g}"
