"""The losses of a training run as an SVG picture, smoothed over 25 updates.

python -m benchmarks.plot_log run/log.csv -o curve.svg
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 320, 46, 34, 14, 190
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#444444")
WINDOW, POINTS = 25, 300


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of the last ``WINDOW`` values."""
    return [sum(values[max(0, i - WINDOW + 1) : i + 1]) / (i + 1 - max(0, i - WINDOW + 1)) for i in range(len(values))]


def draw(columns: dict[str, list[float]], steps: Sequence[float]) -> str:
    """An SVG document; each column is a line over ``steps``."""
    lines = {name: smooth(values) for name, values in columns.items()}
    highest = max(max(values) for values in lines.values())
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in range(5):
        y = TOP + height * (1 - tick / 4)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{highest * tick / 4:.2f}</text>')
        x = LEFT + width * tick / 4
        label = f"{round(steps[-1] * tick / 4)}"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{LEFT + width + 24}" y="{HEIGHT - 14}">updates</text>')
    chosen = range(0, len(steps), max(1, len(steps) // POINTS))
    for row, ((name, values), color) in enumerate(zip(lines.items(), COLORS, strict=False)):
        points = " ".join(
            f"{LEFT + width * steps[i] / steps[-1]:.1f},{TOP + height * (1 - values[i] / highest):.1f}" for i in chosen
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f'<text x="{LEFT + width + 12}" y="{TOP + 14 + 18 * row}" fill="{color}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    with given.log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("step", "rate", "seconds")]
    columns = {name.replace("_", " "): [float(row[name]) for row in rows] for name in names}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(draw(columns, [float(row["step"]) for row in rows]))


if __name__ == "__main__":
    main()
