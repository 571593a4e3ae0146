"""A page about a comparison: the verdict, the stages, and the worst image with the boxes of both sides."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fpn_engine.detections import Detections
from fpn_engine.drawing import category_color, draw_detections, save_picture
from fpn_engine.files import replacing
from fpn_engine.work import Pixels
from fpn_export.demo.page import STYLE
from fpn_export.verification.comparison import Comparison, ImageResult, StageRecord
from fpn_export.verification.matching import match_detections
from fpn_export.verification.report import list_lost, to_dict
from fpn_export.verification.verdict import say_ap, say_error, say_tolerance, say_verdict

PICTURE, PAGE, DATA = "worst.png", "verify.html", "verify.json"
MOST_ROWS = 200  # detections without a twin on the page; the JSON file has all
GAP, BAR = 8, 28  # pixels between the two panels, and of the line above each
PAPER, INK = (255, 255, 255), (28, 35, 48)
FADED = 0.55  # of white mixed into the photograph, so that the boxes stand out


def save_page(comparison: Comparison, pixels: Pixels, folder: Path) -> list[Path]:
    """Write page, picture and JSON into ``folder``; returns their paths, the page first.

    Args: pixels: of ``comparison.worst_image``.
    """
    paths = [folder / PAGE, folder / PICTURE, folder / DATA]
    save_picture(draw_pair(comparison, comparison.worst_image, pixels), paths[1])
    texts = {paths[0]: write_page(comparison), paths[2]: json.dumps(to_dict(comparison), indent=1)}
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def draw_pair(comparison: Comparison, image: ImageResult, pixels: Pixels) -> Image.Image:
    """A's boxes at the left, B's at the right: twins thin, what only one side has thick and named.

    Where all have a twin, all are named.
    """
    matched = match_detections(image.first, image.second)
    panels = []
    for letter, side, found, lost in (
        ("A", comparison.a, image.first, matched.only_a),
        ("B", comparison.b, image.second, matched.only_b),
    ):
        named = lost if matched.only_a or matched.only_b else list(range(len(found)))
        title = f"{letter}  {side.name}, {side.runtime}: {len(found)} detections"
        panels.append(_label(_draw(pixels, found, named), title + (f", {len(lost)} without a twin" if lost else "")))
    width = sum(panel.width for panel in panels) + GAP
    sheet = Image.new("RGB", (width, panels[0].height), PAPER)
    sheet.paste(panels[0], (0, 0))
    sheet.paste(panels[1], (panels[0].width + GAP, 0))
    return sheet


def _draw(pixels: Pixels, found: Detections, named: list[int]) -> Image.Image:
    faded = (pixels * (1 - FADED) + 255 * FADED).round().astype(np.uint8)
    picture = draw_detections(faded, _pick(found, named))
    draw = ImageDraw.Draw(picture)
    for index in sorted(set(range(len(found))) - set(named)):
        draw.rectangle(found.boxes[index].tolist(), outline=category_color(int(found.labels[index]) - 1))
    return picture


def _pick(found: Detections, rows: list[int]) -> Detections:
    return Detections(
        boxes=found.boxes[rows],
        scores=found.scores[rows],
        labels=found.labels[rows],
        image_size=found.image_size,
        categories=found.categories,
    )


def _label(picture: Image.Image, title: str) -> Image.Image:
    """The picture under a line of text, cut off where it is too long."""
    font = ImageFont.load_default(size=15)
    sheet = Image.new("RGB", (picture.width, picture.height + BAR), PAPER)
    sheet.paste(picture, (0, BAR))
    while title and font.getlength(title) > picture.width - 8:
        title = title.rstrip("…")[:-1].rstrip() + "…" if len(title) > 1 else ""
    ImageDraw.Draw(sheet).text((4, 5), title, fill=INK, font=font)
    return sheet


def write_page(comparison: Comparison) -> str:
    """The page as HTML; the picture lies beside it."""
    sentence = say_verdict(comparison)
    verdict = "They agree" if comparison.agrees else "They disagree"
    rows = "\n".join(map(_stage_row, comparison.stages.values()))
    sides = "\n".join(
        f"<p>{letter}: <strong>{escape(side.name)}</strong>, {escape(side.runtime)}</p>"
        for letter, side in (("A", comparison.a), ("B", comparison.b))
    )
    differences = f"<p>The specifications differ: {escape(', '.join(comparison.differences))}.</p>"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{verdict}: {escape(comparison.a.name)} and {escape(comparison.b.name)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{verdict}</h1>
<p>{escape(sentence[:1].upper() + sentence[1:])}</p>
{sides}
{differences if comparison.differences else ""}
<p>{len(comparison.images)} images. {escape(say_ap(comparison))}</p>
<figure style="margin-top: 1.75rem">
<img src="{PICTURE}" alt="The image in which they differ most, with the boxes of both">
<figcaption>{escape(comparison.worst_image.name)}, the image in which they differ most. Thin boxes have a twin.
</figcaption>
</figure>
<section>
<h2>Stage by stage, the largest error over all images</h2>
<table>
<thead><tr><th>stage</th><th>as they came</th><th>given A's input</th><th>tolerance</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p class="legend">Tensors: the norm or the largest of the difference, relative to A's, whichever is more. As they came,
an early difference spoils all that follows; given A's input, each stage of B answers for itself.</p>
</section>
{_lost_section(comparison)}
</main>
</body>
</html>
"""


def _stage_row(record: StageRecord) -> str:
    stage = record.stage
    cells = (stage, say_error(stage, record.came), say_error(stage, record.fed), say_tolerance(record))
    mark = ' class="missed"' if record.departs else ""
    return f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _lost_section(comparison: Comparison) -> str:
    listed = list_lost(comparison)
    if not listed:
        return ""
    rows = "\n".join(
        f"<tr><td>{escape(image.name)}</td><td>{lost.side}</td><td>{escape(lost.name)}</td><td>{lost.score:.3f}</td>"
        f"<td style='white-space: normal'>{escape(lost.cause)}</td></tr>"
        for image, lost in listed[:MOST_ROWS]
    )
    more = f"<p>The first {MOST_ROWS} of {len(listed)}; all are in {DATA}.</p>" if len(listed) > MOST_ROWS else ""
    return f"""<section>
<h2>Without a twin</h2>
<table>
<thead><tr><th>image</th><th>only in</th><th>class</th><th>score</th><th>cause</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
{more}
</section>"""
