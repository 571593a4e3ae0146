"""The command in a process of its own: without torch for few images, with the same results as with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fpn_engine.light import MOST_IMAGES
from tests.engine.conftest import Run, Tiny, save_picture

# What a detection may differ by between the two: see docs/runtime.md.
CORNER, SCORE = 1e-3, 1e-4
REPORT = "import sys\nfrom fpn_engine.cli import main\ntry:\n main()\nfinally:\n print(*sys.modules, file=sys.stderr)"
HEAVY = {"torch", "onnx", "fpn_kernels", "fpn_export", "pycocotools", "triton"}


def start(*arguments: object) -> tuple[str, set[str]]:
    """What the command writes to stdout, and the modules that it imported."""
    command = [sys.executable, "-c", REPORT, *map(str, arguments)]
    known = dict(os.environ)  # without the COLUMNS that readline, which pytest imports, sets behind Python's back
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, set(done.stderr.splitlines()[-1].split())


@pytest.fixture
def pictures(workplace: Path) -> Path:
    for seed in range(3):
        save_picture(workplace / "pictures" / f"{seed}.png", 60 + 7 * seed, 80, seed)
    return workplace / "pictures"


def assert_close(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [one["image"] for one in actual] == [one["image"] for one in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        ours_found, theirs_found = ours.pop("detections"), theirs.pop("detections")
        assert ours == theirs
        assert len(ours_found) == len(theirs_found) > 0
        for a, b in zip(ours_found, theirs_found, strict=True):
            assert a["category_id"] == b["category_id"]
            assert a["score"] == pytest.approx(b["score"], abs=SCORE)
            assert a["box"] == pytest.approx(b["box"], abs=CORNER)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--score", 0.3, "--nms", 0.2, "--max-detections", 5],
        ["--classes", "dog,7", "--batch", 2],
        ["--bucket", 64, "--threads", 1, "--device", "cpu"],
    ],
    ids=str,
)
def test_the_same_json_without_torch(tiny: Tiny, pictures: Path, run: Run, options: list[object]) -> None:
    arguments = ["infer", pictures, "--plan", tiny.plan, "--json", *options]
    out, modules = start(*arguments)
    assert modules & HEAVY == set()
    assert "onnxruntime" in modules
    assert_close(json.loads(out), json.loads(run(*arguments).out))


def test_the_same_pictures_and_table_without_torch(tiny: Tiny, pictures: Path, run: Run) -> None:
    save = pictures.parent / "light", pictures.parent / "torch"
    out, modules = start("infer", pictures, "--plan", tiny.plan, "--save", save[0])
    assert "torch" not in modules
    assert out == run("infer", pictures, "--plan", tiny.plan, "--save", save[1]).out
    for one in ("0.png", "1.png", "2.png"):
        np.testing.assert_array_equal(*(np.array(Image.open(folder / one)) for folder in save))


def test_more_images_are_worth_the_import(tiny: Tiny, pictures: Path) -> None:
    for number in range(MOST_IMAGES - 1):
        save_picture(pictures / f"more{number}.png")
    assert "torch" in start("infer", pictures, "--plan", tiny.plan, "--json")[1]
