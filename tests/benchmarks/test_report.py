"""The report: every row is in it, nothing else is needed to read it, and quick tries are called so."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.report import main, read_results, write_pictures
from benchmarks.report.charts import Bar, Series, Stack, draw_bars, draw_lines, draw_stacks, standalone
from benchmarks.report.page import QUICK, write_markdown, write_page
from benchmarks.report.words import write_ms, write_spread
from fpn_engine.errors import FpnEngineError

RUN = {"date": "2026-01-01", "commit": "abc", "device": "CPU <2> & co", "command": "python -m x", "quick": False}


def spent(median: float) -> dict[str, float]:
    return {"median": median, "p20": 0.9 * median, "p80": 1.2 * median, "rounds": 5}


def timed(median: float, **more: Any) -> dict[str, Any]:
    about = {"precision": "fp32", "how": "call", "milliseconds": spent(median), "images_per_s": 1e3 / median}
    return {**about, "ratio_to_torchvision_fp32": median / 2000, "floor_ms": 9.0, "share_of_floor": 0.3, **more}


def engine_row(batch: int, factor: float) -> dict[str, Any]:
    what = f"R50-FPN, 800x1216, batch {batch}"
    contestants = {"torchvision fp32": timed(2000 * factor), "fpn-engine, native fp32": timed(1234 * factor)}
    return {"suite": "engine", "what": what, "arch": "resnet50", "batch": batch, "size": [800, 1216], **RUN,
            "contestants": contestants}  # fmt: skip


STAGES = ("preprocess", "trunk", "proposals", "RoIAlign", "box head", "final selection and NMS")
POINTS = [{"size": n, "milliseconds": spent(n / 100), "peak_memory_bytes": 100 * n} for n in (1000, 10_000, 100_000)]
FIT = {"exponent": 1.23, "low": 1.1, "high": 1.3, "scale": 0.01}
ROWS: list[dict[str, Any]] = [
    engine_row(1, 1.0) | {"suite": "peers"},
    engine_row(1, 1.0),
    engine_row(4, 3.7),
    {"suite": "engine", "what": "R50-FPN, 800x1216, batch 64", "not_run": "takes too long <here>", **RUN},
    {"suite": "stages", "what": "R50-FPN, 800x1216, batch 1, native fp32", "sum_ms": 60.0, **RUN,
     "share_outside_network": 0.115, "floors_ms": {"trunk": 7.77, "box head": 1.0},
     "stages": {name: {"how": "call", "milliseconds": spent(10.0)} for name in STAGES}},
    {"suite": "precision", "what": "R18 on cells", "images": 72, **RUN,
     "contestants": {"fpn-engine, native bf16": {"AP": 0.5432, "AP_difference": -0.0012, "ratio_to_fp32": 0.51,
                                                  "milliseconds": spent(33.0)}}},
    {"suite": "scaling", "what": "NMS against boxes", "axis": "boxes", "points": POINTS, "time": FIT, "memory": FIT,
     **RUN},
    {"suite": "kernels", "what": "merge P2, batch 1", "precision": "fp32", "implementation": "references", **RUN,
     "contestants": {"fpn_kernels": {"milliseconds": spent(0.0213)}}, "ratios": {"eager": 0.77}, "GB_per_s": 8.1,
     "floor_ms": 0.011, "share_of_floor": 0.52},
    {"suite": "cold", "what": "start of a process", **RUN,
     "contestants": {"fpn-engine --help": {"milliseconds": spent(345.0)}, "x": {"error": "OSError: no"}}},
    {"suite": "cold", "what": "steps", "steps_ms": {"infer, native fp32": {"import": 2000.0, "load": 300.0}}, **RUN},
]  # fmt: skip
EXPECTED = ("1.23 s", "617", "1.1", "12 %", "7.77 ms", "54.32", "-0.12", "1.23 (1.10 to 1.30)", "21.3 µs", "345 ms",
            "0.148 s", "OSError: no", "takes too long", "python -m x", "missed")  # fmt: skip


class Reader(HTMLParser):
    """Checks that elements nest, and gathers text and what the page would load."""

    VOID = ("meta", "path", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [
            str(value) for name, value in attrs if name in ("src", "srcset") or (tag, name) == ("link", "href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_that_stands_alone() -> None:
    page = write_page(ROWS)
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.loaded == []
    assert "<script" not in page
    assert "url(" not in page
    for words in (*EXPECTED, "CPU <2> & co", "takes too long <here>"):
        assert words in reader.text, words
    assert "NMS against boxes: memory grows with boxes to the power" in reader.text
    assert QUICK not in reader.text
    targets = set(re.findall(r'href="#([^"]+)"', page))
    assert targets <= set(re.findall(r'id="([^"]+)"', page))
    assert len(targets) == 11
    assert QUICK in write_page([{**ROWS[0], "quick": True}])


def test_the_same_figures_in_markdown() -> None:
    text = write_markdown(ROWS)
    for words in EXPECTED:
        assert words in text, words
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 10
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, output, pictures = tmp_path / "r.json", tmp_path / "deep" / "report.html", tmp_path / "pictures"
    results.write_text(json.dumps([*ROWS, {"what": "a row of another kind"}]))
    assert main([str(results), "-o", str(output), "--pictures", str(pictures)]) == 0
    written = capsys.readouterr().out.split()
    assert written[:2] == [str(output), str(output.with_suffix(".md"))]
    names = {path.name.removeprefix("cpu-2-co-") for path in pictures.iterdir()}
    assert names == {
        "peers.svg", "throughput.svg", "precision.svg", "scaling-boxes.svg", "stages-native-fp32.svg"
    }  # fmt: skip
    for path in pictures.iterdir():
        ElementTree.parse(path)
        assert "prefers-color-scheme: dark" in path.read_text()
    results.write_text(json.dumps([{**ROWS[0], "quick": True}]))
    with pytest.raises(FpnEngineError, match="quick try"):
        write_pictures(read_results([results]), pictures)


def widths(svg: str) -> list[float]:
    tree = ElementTree.fromstring(svg)
    return [float(rect.get("width", "0")) for rect in tree.iter("{http://www.w3.org/2000/svg}rect")]


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar(label="a < b", value=10.0), Bar(label="c", value=40.0, low=39.0, high=50.0, ours=True)]
    svg = draw_bars(bars, write_ms, "title & more")
    first, second = widths(svg)
    assert second == pytest.approx(4 * first, rel=0.01)
    assert "a &lt; b" in svg
    assert "title &amp; more" in svg


def test_stacks_are_as_long_as_their_parts() -> None:
    stacks = [Stack(label="measured", parts=[("x", 30.0), ("y", 10.0)]), Stack(label="floor", parts=[("x", 20.0)])]
    lengths = widths(draw_stacks(stacks, write_ms, ""))
    assert lengths[0] + 0.6 == pytest.approx(3 * (lengths[1] + 0.6), rel=0.02)
    assert lengths[2] + 0.6 == pytest.approx(2 * (lengths[1] + 0.6), rel=0.02)


def heights(svg: str) -> list[float]:
    return [
        float(circle.get("cy", "0"))
        for circle in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle")
    ]


@pytest.mark.parametrize("log_y", [False, True])
def test_lines_go_where_the_values_are(log_y: bool) -> None:
    series = [Series(label="a", points=[(1, 10.0), (2, 20.0), (4, 40.0)])]
    svg = draw_lines(
        series, "", x_title="x", y_title="y", write_y="{:.0f}".format, log_y=log_y, fits=[(10.0, 1.0)] * log_y
    )
    low, middle, high = heights(svg)
    assert low > middle > high, "upwards"
    assert (middle - high) / (low - middle) == pytest.approx(1.0 if log_y else 2.0, rel=0.02)
    for value, height in ((10, low), (20, middle)):
        (tick,) = re.findall(rf'y="([\d.]+)">{value}<', svg)
        assert float(tick) - 4 == pytest.approx(height, abs=0.2), "where the axis says"


def test_labels_of_lines_that_meet_do_not_overlap() -> None:
    series = [Series(label=name, points=[(1, 1.0), (2, 1.0)]) for name in "abc"]
    svg = draw_lines(series, "", x_title="x", y_title="y", write_y=str)
    places = sorted(float(y) for y, name in re.findall(r'y="([\d.]+)">(\w)</text>', svg) if name in "abc")
    assert len(places) == 3
    assert min(b - a for a, b in pairwise(places)) >= 14


def test_a_picture_brings_its_colours() -> None:
    svg = standalone(draw_bars([Bar(label="a", value=1.0)], write_ms, "t"))
    used = set(re.findall(r"var\(--(\w+)\)", svg))
    assert len(used) >= 3
    for name in used:
        assert f"--{name}: #" in svg


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.0213, "21.3 µs"), (1.5, "1.5 ms"), (999.6, "1000 ms"), (1234.0, "1.23 s"), (0, "0 µs")],
)
def test_units(milliseconds: float, text: str) -> None:
    assert write_ms(milliseconds) == text
    assert write_spread({"median": 2.0, "p20": 1.0, "p80": 1500.0}) == "2 ms (1 to 1500)"
