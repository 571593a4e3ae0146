"""``fpn-engine demo``: what it writes, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fpn_engine.images import read_image
from fpn_export.demo.demonstration import DATA_SET
from fpn_export.scenes import make_scene
from tests.engine.conftest import Bundled, Run
from tests.engine.test_cli_faults import assert_one_sentence

NAMES = ["detections.png", "index.html", "scene.png"]


@pytest.fixture(autouse=True)
def _bundled(bundled: Bundled) -> None:
    """Nothing is prepared or fetched here."""


def test_a_scene_its_picture_and_a_page(workplace: Path, run: Run) -> None:
    ran = run("demo")
    assert ran.code == 0
    folder = workplace / "fpn-engine-demo"
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert sorted(ran.out.split()) == [f"fpn-engine-demo/{name}" for name in NAMES]
    scene = make_scene(DATA_SET, 0)
    np.testing.assert_array_equal(read_image(folder / "scene.png"), scene.image)
    assert (read_image(folder / "detections.png") != scene.image).any()
    assert f"of {len(scene.labels)} objects" in ran.err
    assert ran.err.count("using the demo model, which knows") == 1
    assert "for others: --model coco, or export" in ran.err
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert f"of {len(scene.labels)} objects" in page
    assert "fpn-engine infer fpn-engine-demo/scene.png --model demo --json" in page
    assert json.loads(run("infer", "fpn-engine-demo/scene.png", "--model", "demo", "--json").out)


def test_scenes_differ_and_replace_each_other(workplace: Path, run: Run) -> None:
    scenes = []
    for seed in (1, 2):
        assert run("demo", "--seed", seed, "-o", "new/x").code == 0
        scenes.append((workplace / "new" / "x" / "scene.png").read_bytes())
    assert scenes[0] != scenes[1]
    (workplace / "new" / "x" / "index.html").unlink()  # as after an interrupt
    assert run("demo", "--seed", 1, "-o", "new/x").code == 0
    assert (workplace / "new" / "x" / "scene.png").read_bytes() == scenes[0]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_others_stay(name: str, workplace: Path, run: Run) -> None:
    (workplace / name).write_bytes(b"mine")
    ran = run("demo", "--output", ".")
    assert (ran.code, ran.out) == (1, "")
    assert f"{name} is not from an earlier demo; name another folder with --output" in ran.err
    assert_one_sentence(ran.err)
    assert {path.name: path.read_bytes() for path in workplace.iterdir()} == {name: b"mine"}


def test_folders_that_cannot_be(workplace: Path, run: Run) -> None:
    (workplace / "file").write_text("mine")
    (workplace / "folder" / "scene.png").mkdir(parents=True)
    (workplace / "links").mkdir()
    (workplace / "links" / "index.html").symlink_to("nowhere")
    for output in ("file", "folder", "links"):
        ran = run("demo", "-o", output)
        assert (ran.code, ran.out) == (1, "")
        assert_one_sentence(ran.err)
    assert (workplace / "file").read_text() == "mine"


@pytest.mark.parametrize("seed", ["-1", "4294967296", "x"])
def test_seeds_that_are_none(seed: str, run: Run) -> None:
    assert run("demo", "--seed", seed).code == 2
