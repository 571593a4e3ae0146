"""Every figure in README and docs stands in a result file with its provenance, or says that it is given.

A figure is a number with a unit of time, speed, score or share. The block that holds it, a paragraph, list or table,
has a comment before it, on a line of its own:

    <!-- figures: cpu.json median_ratio p20 -->     each stands under one of these keys of benchmarks/results/cpu.json,
                                                    and each key is named by one; without keys, anywhere in the file
    <!-- given: how long the option waits -->       set, published or agreed, and not measured by us

A name with a slash in it is that of a bundled model's record. Figures may be rounded, and in a larger or smaller unit.
Code is exempt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROVENANCE = {"command", "date", "commit", "device", "packages"}
MODEL_PROVENANCE = {"trained_with", "recipe", "data", "validation", "sha256"}  # of a bundled model's record

NUMBER = r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
UNIT = (
    r"(?:ms|us|µs|s|seconds?|minutes?|images?/s|images? (?:a|per) second|img/s|GB/s|TB/s|GFLOP/s|TFLOP/s"
    r"|times (?:as fast|as slow|faster|slower|the time)|%|points?|px)(?![\w/-])"
)
FIGURE = re.compile(rf"({NUMBER})(?: (?:and|to|or) {NUMBER})? ?{UNIT}|\bAP(?: of| is|:)? ({NUMBER})|({NUMBER}) AP\b")
DECIMAL = re.compile(rf"({NUMBER})")
MARK = re.compile(r"^<!-- (figures|given): (.+?) -->$")
CODE = re.compile(
    r"`[^`]*`|\]\([^)]*\)|\b(?:Python|CUDA|TensorRT|PyTorch|Triton|Runtime|version) \d[\d.]*"
)  # and versions
SCALES = [Decimal(1).scaleb(power) for power in (0, 3, -3, 6, -6, 2, 9, -9)]  # of seconds, shares, bytes


@dataclass(frozen=True, slots=True)
class Block:
    """Lines without a blank one between; ``kind`` and ``about``: of the mark before them, empty where there is none."""

    document: str
    line: int
    text: str
    kind: str = ""
    about: str = ""

    def find_figures(self) -> list[str]:
        text = CODE.sub(" ", self.text)
        return [next(group for group in match.groups() if group) for match in FIGURE.finditer(text)]

    def find_numbers(self) -> list[str]:
        """All that are checked in a block of figures: with a unit, or of decimal places."""
        text = CODE.sub(" ", self.text)
        decimals = (match[1] for match in DECIMAL.finditer(text) if "." in match[1] or "e" in match[1])
        return list(dict.fromkeys([*self.find_figures(), *decimals]))


def read_blocks(text: str, document: str) -> Iterator[Block]:
    """Fenced and indented code is left out."""
    mark, lines, begin, fenced = ("", ""), list[str](), 0, False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if fenced or (line.startswith("    ") and not lines):
            continue
        if found := MARK.match(line.strip()):
            mark = (found[1], found[2])
        elif line.strip():
            begin = begin or number
            lines.append(line)
        elif lines:
            yield Block(document, begin, "\n".join(lines), *mark)
            mark, lines, begin = ("", ""), [], 0


def find_faults(block: Block, results: Path = RESULTS) -> list[str]:
    """What is wrong with a block, a line each."""
    where = f"{block.document}:{block.line}"
    if block.kind == "given":
        return [] if len(block.about.split()) > 1 else [f"{where}: say why these figures are given"]
    if block.kind == "":
        return [
            f"{where}: {figure} is neither from a result file nor said to be given" for figure in block.find_figures()
        ]
    name, *keys = block.about.split()
    path = ROOT / name if "/" in name else results / name
    if not path.exists():
        return [f"{where}: there is no result file {name}"]
    rows = json.loads(path.read_text())
    wanted, told = (PROVENANCE, rows) if isinstance(rows, list) else (MODEL_PROVENANCE, [rows["about"]])
    if missing := [key for row in told for key in wanted - row.keys()]:
        return [f"{where}: {name} has rows without {missing[0]}"]
    known = {key: list(find_values(rows, {key})) for key in keys} or {"": list(find_values(rows))}
    everything = [value for values in known.values() for value in values]
    numbers = block.find_numbers()
    absent = [number for number in numbers if not any(stands_for(number, value) for value in everything)]
    used = {key for key, values in known.items() for n in numbers for value in values if stands_for(n, value)}
    return [f"{where}: {number} is not in {block.about}" for number in absent] + [
        f"{where}: no figure is {key or 'anything'} of {name}" for key in known.keys() - used
    ]


def find_values(tree: Any, keys: Iterable[str] = (), inside: bool | None = None) -> Iterator[Decimal]:
    """Numbers of a JSON tree, those under one of ``keys`` if any are given."""
    inside = not keys if inside is None else inside
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from find_values(value, keys, inside or key in keys)
    elif isinstance(tree, list):
        for value in tree:
            yield from find_values(value, keys, inside)
    elif inside and isinstance(tree, int | float) and not isinstance(tree, bool):
        yield Decimal(str(tree))


def stands_for(text: str, value: Decimal) -> bool:
    """Whether a number of a document is this value, rounded and in some unit."""
    number = Decimal(text.replace(",", "").lstrip("+"))
    step = Decimal(1).scaleb(int(number.as_tuple().exponent))
    return any(
        number == (value * scale).quantize(step, rounding)
        for scale in SCALES
        for rounding in (ROUND_HALF_UP, ROUND_HALF_EVEN)
        if abs(value * scale) < 10**15
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_figures_come_from_result_files(document: Path) -> None:
    faults = [fault for block in read_blocks(document.read_text(), document.name) for fault in find_faults(block)]
    assert not faults, "\n".join(faults)


def test_the_documents_do_have_figures() -> None:
    marked = [b for d in DOCUMENTS for b in read_blocks(d.read_text(), d.name) if b.kind == "figures"]
    assert len(marked) >= 3
    assert sum(len(block.find_numbers()) for block in marked) >= 15


@pytest.fixture
def results(tmp_path: Path) -> Path:
    facts = dict.fromkeys(PROVENANCE, "x")
    (tmp_path / "a.json").write_text(json.dumps([{"ratio": 0.611, "spent": {"median": 2113.4, "p20": 1.5}, **facts}]))
    (tmp_path / "bare.json").write_text(json.dumps([{"ratio": 0.611}]))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("It takes 3.4 ms.", "neither"),
        ("It has AP 0.52 there.", "neither"),
        ("It is 1.6 times as fast.", "neither"),
        ("| a | 12 % |", "neither"),
        ("between 2 and 3 seconds", "neither"),
        ("Python 3.11, 91 classes, 800x1216, a file of 168 MB", ""),
        ("`--seconds 5 s`\n\n```\nsleep 5 s\n```\n\n    wait 5 s", ""),
        ("<!-- given: the option's default -->\nwaits 5 s", ""),
        ("<!-- given: because -->\nwaits 5 s", "say why"),
        ("<!-- given: the option's default -->\nwaits 5 s\n\nand takes 6 s", "neither"),
        ("<!-- figures: a.json ratio median -->\n| ratio | 0.611 |\n| time | 2.113 s |", ""),
        ("<!-- figures: a.json ratio median -->\nratio 0.61, 2.1 s", ""),
        ("<!-- figures: a.json ratio median -->\nratio 0.62, 2.1 s", "0.62 is not in"),
        ("<!-- figures: a.json ratio -->\nratio 0.61, 2.1 s", "2.1 is not in"),
        ("<!-- figures: a.json ratio p20 -->\nratio 0.611", "no figure is p20"),
        ("<!-- figures: a.json -->\nratio 61.1 %, 2113 ms, 1.5", ""),
        ("<!-- figures: a.json -->\nratio 0.612", "0.612 is not in"),
        ("<!-- figures: b.json -->\nratio 0.611", "no result file b.json"),
        ("<!-- figures: bare.json -->\nratio 0.611", "without"),
    ],
)
def test_faults_would_be_seen(text: str, fault: str, results: Path) -> None:
    faults = [found for block in read_blocks(text, "x.md") for found in find_faults(block, results)]
    assert bool(faults) == bool(fault), faults
    assert fault in "".join(faults)
