"""The page of the demonstration: well-formed, self-contained, and true to what it shows."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpn_engine.spec import Category
from fpn_export.demo import Comparison, Run, write_page
from fpn_export.demo.comparison import Pair

VOID = {"meta", "img", "link", "br"}
PICTURE = Image.fromarray(np.full((48, 64, 3), 200, np.uint8))
HOSTILE = '<script>alert("&")</script>'


class Reader(HTMLParser):
    """Checks that tags are closed in order; keeps attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and "td" in self.open:
            self.rows[-1][-1] += data


def read(comparison: Comparison, scene: str = "fpn-engine-demo/scene.png", name: str = "disc") -> Reader:
    categories = (Category(id=1, name=name), Category(id=2, name="ring"))
    run = Run(seed=7, seconds=0.1234, runtime="onnxruntime fp32 on the CPU", categories=categories)
    reader = Reader()
    reader.feed(write_page(PICTURE, comparison, run, Path(scene)))
    reader.close()
    assert reader.open == []
    return reader


def pair(name: str = "disc", score: float | None = 0.98) -> Pair:
    return Pair(name=name, width=30, height=20, coverage=0.25, score=score, iou=None if score is None else 0.87)


def test_objects_and_boxes_of_none() -> None:
    page = read(Comparison([pair(), pair("ring", None)], [("ring", 0.52)]))
    rows = [row for row in page.rows if row]
    assert rows == [["disc", "30 × 20", "25%", "0.98", "0.87"], ["ring", "30 × 20", "25%", "missed"], ["ring", "0.52"]]
    for text in ("found 1 of 2 objects", "123 ms", "onnxruntime fp32 on the CPU", "scene 7, 64 × 48", "--seed 8"):
        assert text in page.text
    assert "Found, but not there" not in read(Comparison([pair()], [])).text


def test_the_page_needs_nothing_beside_it() -> None:
    page = read(Comparison([pair()], [("ring", 0.52)]))
    links = [(tag, value) for tag, name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    ((tag, url),) = links
    assert tag == "img"
    kind, _, data = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == PICTURE.size
    assert "url(" not in page.text
    assert "@import" not in page.text


@pytest.mark.parametrize("scene", ["my demo's/scene.png", f"{HOSTILE}/scene.png"])
def test_names_are_text(scene: str) -> None:
    page = read(Comparison([pair(HOSTILE)], [(HOSTILE, 0.6)]), scene, name=HOSTILE)
    assert not any(tag == "script" for tag, _, _ in page.attributes)
    assert [row[0] for row in page.rows if row] == [HOSTILE, HOSTILE]
    assert "'" in page.text.split("fpn-engine infer ")[1][0]  # quoted for the shell


def test_nothing_there() -> None:
    assert "found 0 of 0 objects" in read(Comparison([], [])).text
