"""One HTML page that needs nothing beside it: the picture, what was found and what is there, and how to go on."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fpn_engine.drawing import Color, category_color
from fpn_engine.spec import Category
from fpn_export.demo.comparison import Comparison, Pair
from fpn_export.demo.folder import MARK

JPEG_QUALITY = 90
NO_COLOR: Color = (128, 128, 128)  # of a class that the model does not know


class Run(NamedTuple):
    """How the scene was looked at.

    Attributes: seed: of the scene. seconds: of one detection. runtime: how it was run, for people.
        categories: that the model knows, in label order.
    """

    seed: int
    seconds: float
    runtime: str
    categories: tuple[Category, ...]


STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6577; --line: #e3e7ed; --ground: #f5f6f8; --sheet: #fff;
  --missed: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf2; --soft: #98a3b5; --line: #2b3341; --ground: #11151b;
  --sheet: #1a2029; --missed: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 0 0 .75rem; font-size: 1.05rem; }
h3 { margin: 0; color: var(--soft); font-size: .9rem; font-weight: 500; }
p { margin: .5rem 0 0; color: var(--soft); }
.columns { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1.5rem; margin-top: 1.75rem;
  align-items: start; }
@media (min-width: 62rem) { .columns { grid-template-columns: minmax(0, 642px) minmax(0, 1fr); } }
figure, section { margin: 0; background: var(--sheet); border: 1px solid var(--line); border-radius: .75rem; }
figure { overflow: hidden; }
img { display: block; width: 100%; height: auto; }
figcaption { padding: .7rem 1.25rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .9rem; }
section { padding: 1.1rem 1.25rem 1.25rem; }
figure + section, section + section { margin-top: 1.5rem; }
table { width: 100%; border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th { padding: 0 0 .4rem .75rem; color: var(--soft); font-weight: 500; text-align: right; }
td { padding: .3rem 0 .3rem .75rem; border-top: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
.missed td:last-child { color: var(--missed); }
.dot { display: inline-block; width: .7em; height: .7em; margin-right: .6em; border-radius: 50%; }
.legend { margin-top: .9rem; font-size: .85rem; }
pre { margin: .3rem 0 1rem; padding: .6rem .9rem; overflow-x: auto; background: var(--ground); border-radius: .5rem;
  border: 1px solid var(--line); font: .88rem/1.5 ui-monospace, monospace; }
pre:last-child { margin-bottom: 0; }
"""


def write_page(picture: Image.Image, comparison: Comparison, run: Run, scene: Path) -> str:
    """The page as HTML.

    Args:
        picture: the scene with the detections drawn in.
        scene: where the scene lies, for the commands that go on with it.
    """
    found, there = comparison.found, len(comparison.pairs)
    title = f"fpn-engine found {found} of {there} objects"
    colors = {category.name: category_color(index) for index, category in enumerate(run.categories)}
    rows = "\n".join(_row(pair, colors) for pair in comparison.pairs)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{MARK}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{run.seconds * 1000:.0f} ms for the picture, {escape(run.runtime)}.</p>
<div class="columns">
<div>
<figure>
<img src="{_data_url(picture)}" width="{picture.width}" height="{picture.height}" alt="The scene with boxes drawn in">
<figcaption>Generated scene {run.seed}, {picture.width} × {picture.height} pixels. Boxes with a score from 0.5, a colour
for each class.</figcaption>
</figure>
<section>
<h2>Go on</h2>
{_commands(scene, run.seed)}
</section>
</div>
<div>
<section>
<h2>What is there, largest first</h2>
<table>
<thead><tr><th>class</th><th>pixels</th><th>hidden</th><th>score</th><th>IoU</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p class="legend">Hidden: the share of the object behind others. IoU: how well the box found fits the visible part.</p>
</section>
{_list_spurious(comparison, colors)}
</div>
</div>
</main>
</body>
</html>
"""


def _row(pair: Pair, colors: Mapping[str, Color]) -> str:
    cells = [
        f"<td>{_class(pair.name, colors)}</td>",
        f"<td>{pair.width} × {pair.height}</td>",
        f"<td>{pair.coverage:.0%}</td>" if pair.coverage >= 0.005 else "<td></td>",
    ]
    if pair.score is None or pair.iou is None:
        return f'<tr class="missed">{"".join(cells)}<td colspan="2">missed</td></tr>'
    return f"<tr>{''.join(cells)}<td>{pair.score:.2f}</td><td>{pair.iou:.2f}</td></tr>"


def _list_spurious(comparison: Comparison, colors: Mapping[str, Color]) -> str:
    if not comparison.spurious:
        return ""
    rows = "\n".join(
        f"<tr><td>{_class(name, colors)}</td><td>{score:.2f}</td></tr>" for name, score in comparison.spurious
    )
    return f"""<section>
<h2>Found, but not there</h2>
<table>
<thead><tr><th>class</th><th>score</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</section>"""


def _class(name: str, colors: Mapping[str, Color]) -> str:
    """The name beside the colour of its boxes."""
    color = "#{:02x}{:02x}{:02x}".format(*colors.get(name, NO_COLOR))
    return f'<span class="dot" style="background:{color}"></span>{escape(name)}'


def _commands(scene: Path, seed: int) -> str:
    quoted = shlex.quote(str(scene))
    commands = {
        "This scene again, for a program to read": f"fpn-engine infer {quoted} --model demo --json",
        "Another scene": f"fpn-engine demo --seed {seed + 1}",
        "A photograph, with the 80 classes of COCO": "fpn-engine infer photo.jpg --model coco --save out",
        "Your own model": "fpn-engine export model.pth\nfpn-engine build model.onnx\nfpn-engine infer photo.jpg",
    }
    return "\n".join(f"<h3>{escape(title)}</h3>\n<pre>{escape(command)}</pre>" for title, command in commands.items())


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
