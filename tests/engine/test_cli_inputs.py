"""What a command reads is never what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine.conftest import SPEC, Run, Tiny, save_picture


@pytest.fixture
def inputs(workplace: Path, tiny: Tiny) -> Path:
    """A folder of everything that a command reads, by names that commands could be told to write."""
    save_picture(workplace / "images" / "a.png", seed=1)
    shutil.copyfile(tiny.plan, workplace / "tiny.plan")
    shutil.copyfile(tiny.model, workplace / "tiny.onnx")
    categories = [{"id": category.id, "name": category.name} for category in SPEC.categories]
    box = {"image_id": 1, "category_id": categories[0]["id"], "bbox": [1, 1, 20, 20]}
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "height": 60, "width": 80}],
        "categories": categories,
        "annotations": [box],
    }
    (workplace / "truth.json").write_text(json.dumps(truth))
    (workplace / "link.json").symlink_to("truth.json")
    return workplace


INFER = ("infer", "images", "--plan", "tiny.plan")
EVAL = ("eval", "--plan", "tiny.plan", "--annotations", "truth.json", "--images", "images")
QUANTIZE = ("quantize", "tiny.onnx", "--images", "images", "--calibrate", 1, "--score", 1, "--sensitivity", 0)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((*INFER, "--json", "-o", "images/a.png"), "--output images/a.png would replace images/a.png"),
        ((*INFER, "--format", "jsonl", "-o", "images/a.png"), "would replace images/a.png"),
        ((*INFER, "--json", "-o", "tiny.plan"), "--output tiny.plan would replace tiny.plan"),
        ((*INFER, "--format", "coco", "--annotations", "truth.json", "-o", "link.json"), "would replace truth.json"),
        ((*EVAL, "--save-proposals", "truth.json"), "--save-proposals truth.json would replace truth.json"),
        (("bench", "tiny.plan", "--rounds", 1, "--trace", "tiny.plan"), "--trace tiny.plan would replace"),
        (
            ("bench", "tiny.plan", "--images", "images", "--rounds", 1, "--trace", "images/a.png"),
            "--trace images/a.png would replace images/a.png",
        ),
        ((*QUANTIZE, "-o", "tiny.onnx"), "--output tiny.onnx would replace tiny.onnx"),
        ((*QUANTIZE, "-o", "truth.onnx"), "the report would replace truth.json"),
        ((*QUANTIZE, "-o", "q.json"), "give a name that ends in .onnx, not q.json"),
    ],
)
def test_it_is_refused_before_anything_is_written(
    inputs: Path, run: Run, command: tuple[object, ...], words: str
) -> None:
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    done = run(*command)
    assert done.code == 1
    assert words in done.err
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == before


def test_an_earlier_report_is_replaced(inputs: Path, run: Run) -> None:
    assert [run(*QUANTIZE, "-o", "q.onnx").code for _ in range(2)] == [0, 0]
    assert json.loads((inputs / "q.json").read_text())["calibrated_on"] == 1


def test_the_next_command_can_be_copied(inputs: Path, run: Run) -> None:
    """Quoted, and with the plan where another would be found."""
    (inputs / "other folder").mkdir()
    assert "next: fpn-engine infer image.jpg\n" in run("build", "tiny.onnx", "-o", "tiny.plan").err
    built = run("build", "tiny.onnx", "-o", "other folder/b.plan").err
    assert "next: fpn-engine infer image.jpg --plan 'other folder/b.plan'\n" in built
