"""Detections drawn on a photograph: boxes and name tags, with Pillow alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fpn_engine.detections import Detections
from fpn_engine.errors import FpnEngineError
from fpn_engine.files import replacing

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, both ends inside

# Sizes as a share of the picture's side (the root of its area): looks the same when scaled to a screen.
LINE_SHARE = 1 / 250
FONT_SHARE = 1 / 42
MIN_FONT_SIZE = 10
CROWDED = 30  # from this many detections lines and tags shrink, down to MIN_CROWDED_SCALE
MIN_CROWDED_SCALE = 0.6

HALO: tuple[int, int, int, int] = (0, 0, 0, 90)  # one dark pixel around each line, for pale backgrounds

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # turns by this share of the hue circle never come close to repeating
FIRST_HUE = 0.07
LIGHTNESS = (0.58, 0.68, 0.82)
CHROMA = 0.20


def draw_detections(image: NDArray[np.uint8], detections: Detections) -> Image.Image:
    """Draw every detection on a copy of ``image``, the best on top.

    A category has the same colour in every picture. Tags stand above their box where there is room and
    step aside for the tags of better detections; all ink stays inside the picture.

    Args:
        image: (H, W, 3) uint8 RGB, upright, the picture that ``detections`` belongs to.
        detections: boxes in pixels of ``image``; parts outside of it are cut off.
    Returns: an RGB picture of the same size.
    Raises: ValueError if ``image`` is not (H, W, 3) uint8.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    picture = Image.fromarray(image)  # always a copy: Pillow keeps RGB in four bytes
    if len(detections) == 0:
        return picture

    side = math.sqrt(picture.width * picture.height)
    scale = max(MIN_CROWDED_SCALE, min(1.0, math.sqrt(CROWDED / len(detections))))
    line = max(1, round(side * LINE_SHARE * scale))
    font = _load_font(max(MIN_FONT_SIZE, round(side * FONT_SHARE * scale)))
    draw = ImageDraw.Draw(picture, "RGBA")

    boxes = _pixel_boxes(detections.boxes, picture.size)
    colors = [category_color(label - 1) for label in detections.labels.tolist()]
    texts = [
        f"{' '.join(name.split())} {score:.2f}"
        for name, score in zip(detections.names, detections.scores.tolist(), strict=True)
    ]
    tags = _place_tags(boxes, [_tag_size(text, font) for text in texts], picture.size)

    for box, color in zip(reversed(boxes), reversed(colors), strict=True):
        _draw_box(draw, box, color, line)
    for tag, text, color in zip(reversed(tags), reversed(texts), reversed(colors), strict=True):
        _draw_tag(draw, tag, text, color, font)
    return picture


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write ``picture`` in the format its suffix names (.jpg, .png, ...), whole or not at all.

    Missing folders are created. The file appears under its name only when complete.

    Raises: FpnEngineError for an unknown suffix, no permission, a full disk.
    """
    path = Path(path)
    format = Image.registered_extensions().get(path.suffix.lower())
    if format is None:
        raise FpnEngineError(f"cannot save {path}: unknown picture format {path.suffix!r}; use .jpg or .png")
    # 4:4:4 keeps thin coloured lines sharp.
    options: dict[str, Any] = {"quality": 92, "subsampling": 0} if format == "JPEG" else {}
    with replacing(path) as temporary:
        picture.save(temporary, format=format, **options)


def category_color(index: int) -> Color:
    """The colour of the category at ``index`` (0-based, in the model's order): golden-ratio hues in OKLCH.

    Equal steps in OKLCH (Ottosson 2020) look equally far apart; every third category shares a lightness,
    so that neighbouring hues differ in it too.
    """
    hue = 2 * math.pi * (FIRST_HUE + index * GOLDEN_RATIO)
    lightness, chroma = LIGHTNESS[index % len(LIGHTNESS)], CHROMA
    while True:
        rgb = _oklab_to_linear(lightness, chroma * math.cos(hue), chroma * math.sin(hue))
        if min(rgb) >= 0 and max(rgb) <= 1:
            break
        chroma -= 0.005  # towards grey, which every lightness has
    red, green, blue = (round(255 * _encode_gamma(channel)) for channel in rgb)
    return red, green, blue


def _oklab_to_linear(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    """OKLab to linear sRGB, by Ottosson's matrices."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _encode_gamma(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def text_color(background: Color) -> Color:
    """Black or white, whichever contrasts more with ``background`` (WCAG 2 relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(background) / 255]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


def _pixel_boxes(boxes: NDArray[np.float32], size: tuple[int, int]) -> list[Rectangle]:
    """Half-open float boxes as the pixels they cover, cut to the picture, at least one pixel each."""
    last = np.array([size[0] - 1, size[1] - 1])
    first_corner = np.clip(np.rint(boxes[:, :2]), 0, last)
    last_corner = np.clip(np.rint(boxes[:, 2:]) - 1, first_corner, last)
    return [(a, b, c, d) for a, b, c, d in np.hstack([first_corner, last_corner]).astype(int).tolist()]


def _load_font(size: int) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))  # scalable whenever a size is given


def _padding(font: ImageFont.FreeTypeFont) -> int:
    return max(2, round(font.size / 4))


def _tag_size(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Width and height of a tag: the font's own height, so that all tags are equally high."""
    ascent, descent = font.getmetrics()
    return math.ceil(font.getlength(text)) + 2 * _padding(font), ascent + descent


def _place_tags(boxes: list[Rectangle], sizes: list[tuple[int, int]], picture: tuple[int, int]) -> list[Rectangle]:
    """Put each tag, best first, where it covers the least of the tags before it."""
    placed: list[Rectangle] = []
    for (x0, y0, x1, y1), (width, height) in zip(boxes, sizes, strict=True):
        corners = [
            (x0, y0 - height),  # above
            (x0, y1 + 1),  # below
            (x1 - width + 1, y0 - height),
            (x1 - width + 1, y1 + 1),
            (x0, y0),  # inside
            (x0, y1 - height + 1),
        ]
        candidates = [_inside(x, y, width, height, picture) for x, y in corners]
        placed.append(min(candidates, key=lambda tag: _covered_area(tag, placed)))
    return placed


def _inside(x: int, y: int, width: int, height: int, picture: tuple[int, int]) -> Rectangle:
    x = max(0, min(x, picture[0] - width))
    y = max(0, min(y, picture[1] - height))
    return x, y, x + width - 1, y + height - 1


def _covered_area(tag: Rectangle, placed: list[Rectangle]) -> int:
    if not placed:
        return 0
    others = np.array(placed)
    width = np.minimum(others[:, 2], tag[2]) - np.maximum(others[:, 0], tag[0]) + 1
    height = np.minimum(others[:, 3], tag[3]) - np.maximum(others[:, 1], tag[1]) + 1
    return int((width.clip(0) * height.clip(0)).sum())


def _draw_box(draw: ImageDraw.ImageDraw, box: Rectangle, color: Color, line: int) -> None:
    x0, y0, x1, y1 = box
    line = min(line, (min(x1 - x0, y1 - y0) + 2) // 2)  # a tiny box is filled, never overrun
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=HALO, width=line + 2)
    draw.rectangle(box, outline=color, width=line)


def _draw_tag(draw: ImageDraw.ImageDraw, tag: Rectangle, text: str, color: Color, font: ImageFont.FreeTypeFont) -> None:
    x0, y0, x1, y1 = tag
    radius = font.size / 5
    draw.rounded_rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), radius + 1, fill=HALO)
    draw.rounded_rectangle(tag, radius, fill=color)
    draw.text((x0 + _padding(font), y0), text, fill=text_color(color), font=font)
