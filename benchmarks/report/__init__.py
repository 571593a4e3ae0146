"""``python -m benchmarks report``: what the result files say, as a page, as Markdown and as pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.charts import standalone
from benchmarks.report.ledger import make_sections
from benchmarks.report.page import group_by_device, write_markdown, write_page
from benchmarks.rows import Row, latest, read_rows
from fpn_engine.errors import FpnEngineError
from fpn_engine.files import replacing

RESULTS = Path(__file__).parents[1] / "results"


def read_results(paths: Sequence[Path]) -> list[Row]:
    """Rows of suites, the newest of each; other rows that stand in result files have their own documents.

    Raises: FpnEngineError if a file cannot be read or there is no such row.
    """
    rows = latest(row for path in paths for row in read_rows(path) if "suite" in row)
    if not rows:
        raise FpnEngineError("there are no rows of suites in these files; python -m benchmarks -o FILE measures them")
    return rows


def write_report(rows: Sequence[Row], output: Path) -> list[Path]:
    """``output`` and the same in Markdown beside it."""
    pages = {output: write_page(rows), output.with_suffix(".md"): write_markdown(rows)}
    for path, text in pages.items():
        _write(path, text)
    return list(pages)


def write_pictures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The named charts as SVG files, ``DEVICE-NAME.svg``. Raises: FpnEngineError for rows of a quick try."""
    if any(row.get("quick") for row in rows):
        raise FpnEngineError("pictures are for documents, and these rows are of a quick try; measure without --quick")
    paths = []
    for device, found in group_by_device(rows).items():
        short = _shorten(device)
        for section in make_sections(found):
            for chart in section.charts:
                if chart.name:
                    paths.append(folder / f"{short}-{_shorten(chart.name)}.svg")
                    _write(paths[-1], standalone(chart.svg))
    return paths


def _shorten(name: str) -> str:
    """For a file's name: words and hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.replace("'", "")).lower().split())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="result files; default all of benchmarks/results/")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="REPORT.html")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the charts as SVG files too")
    given = parser.parse_args(argv)
    if given.output.suffix not in (".html", ".htm"):
        parser.error(f"the report is a page: give -o a name that ends in .html, not {given.output}")
    rows = read_results(given.results or sorted(RESULTS.glob("*.json")))
    written = write_report(rows, given.output)
    if given.pictures:
        written += write_pictures(rows, given.pictures)
    for path in written:
        print(path)
    return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text)
